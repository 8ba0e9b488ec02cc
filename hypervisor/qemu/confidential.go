// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"

	"github.com/cloister-project/cloister/hypervisor"
)

// teeObjectID is the id of the object behind the machine's confidential-guest-support.
const teeObjectID = "tee0"

// Types of these objects.
const (
	typeSNP = "sev-snp-guest"
	typeTDX = "tdx-guest"
	typeSE  = "s390-pv-guest"
)

// snpObject is the argument of -object for SEV-SNP, SevSnpGuestProperties in QEMU's qapi/qom.json. Byte fields become
// base64, as QEMU takes them; all that can be given is given, so that no default of QEMU counts.
type snpObject struct {
	Type            string `json:"qom-type"`
	ID              string `json:"id"`
	CBitPosition    uint32 `json:"cbitpos"`
	ReducedPhysBits uint32 `json:"reduced-phys-bits"`
	Policy          uint64 `json:"policy"`
	KernelHashes    bool   `json:"kernel-hashes"`
	HostData        []byte `json:"host-data,omitempty"`
	IDBlock         []byte `json:"id-block,omitempty"`
	IDAuth          []byte `json:"id-auth,omitempty"`
	AuthorKey       bool   `json:"author-key-enabled"`
}

// tdxObject is the argument of -object for TDX, TdxGuestProperties in QEMU's qapi/qom.json.
type tdxObject struct {
	Type          string         `json:"qom-type"`
	ID            string         `json:"id"`
	Attributes    uint64         `json:"attributes"`
	MRConfigID    []byte         `json:"mrconfigid,omitempty"`
	MROwner       []byte         `json:"mrowner,omitempty"`
	MROwnerConfig []byte         `json:"mrownerconfig,omitempty"`
	QuoteSocket   *socketAddress `json:"quote-generation-socket,omitempty"`
}

// socketAddress is SocketAddress of QEMU's qapi/sockets.json, unix or vsock; numbers are text there.
type socketAddress struct {
	Type string `json:"type"`
	Path string `json:"path,omitempty"`
	CID  string `json:"cid,omitempty"`
	Port string `json:"port,omitempty"`
}

type plainObject struct {
	Type string `json:"qom-type"`
	ID   string `json:"id"`
}

// teeObject is the object of the document's platform; nil if it has none. It is JSON: nested values exist in no other
// form.
func teeObject(doc hypervisor.Document) ([]byte, error) {
	switch c := doc.Confidential; {
	case c == nil:
		return nil, nil
	case c.SNP != nil:
		return json.Marshal(snpObject{
			Type: typeSNP, ID: teeObjectID,
			CBitPosition: c.SNP.CBitPosition, ReducedPhysBits: c.SNP.ReducedPhysBits,
			Policy: c.SNP.Policy, KernelHashes: c.SNP.KernelHashes, HostData: c.SNP.HostData,
			IDBlock: c.SNP.IDBlock, IDAuth: c.SNP.IDAuth, AuthorKey: c.SNP.AuthorKey,
		})
	case c.TDX != nil:
		o := tdxObject{
			Type: typeTDX, ID: teeObjectID, Attributes: c.TDX.Attributes,
			MRConfigID: c.TDX.MRConfigID, MROwner: c.TDX.MROwner, MROwnerConfig: c.TDX.MROwnerConfig,
		}
		if q := c.TDX.QuoteSocket; q != nil && q.Path != "" {
			o.QuoteSocket = &socketAddress{Type: "unix", Path: q.Path}
		} else if q != nil {
			o.QuoteSocket = &socketAddress{Type: "vsock", CID: decimal(q.CID), Port: decimal(q.Port)}
		}
		return json.Marshal(o)
	case c.SecureExecution:
		return json.Marshal(plainObject{Type: typeSE, ID: teeObjectID})
	}
	return nil, nil
}

func decimal(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// lacksTEE names what the binary lacks of the document's platform: the object, or those of its properties that the
// document needs.
func (f Features) lacksTEE(doc hypervisor.Document) []string {
	object, err := teeObject(doc)
	if object == nil || err != nil {
		return nil
	}
	var given map[string]any
	if err := json.Unmarshal(object, &given); err != nil {
		return nil
	}
	kind, _ := given["qom-type"].(string)
	if !slices.Contains(f.Types, kind) {
		return []string{kind}
	}
	var missing []string
	for _, p := range slices.Sorted(maps.Keys(given)) {
		if p != "qom-type" && p != "id" && !slices.Contains(f.Objects[kind], p) {
			missing = append(missing, kind+"."+p)
		}
	}
	return missing
}
