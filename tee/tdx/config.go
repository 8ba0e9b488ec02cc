// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

// Bits of a TD's attributes: Intel TDX Module ABI Specification (348551), ATTRIBUTES.
const (
	AttributeDebug                = abi.TDXAttributeDebug
	AttributeSEPTVEDisable uint64 = 1 << 28
	AttributePKS           uint64 = 1 << 30
)

// DefaultAttributes are what a TD should have if nobody says more.
const DefaultAttributes = AttributeSEPTVEDisable

// attributeNames are of bits that exist and that a configuration may not set, with the reason.
var attributeNames = map[int]string{
	4:  "HGS_PLUS_PROF: lets the host profile the guest",
	5:  "PERF_PROF: lets the host profile the guest",
	6:  "PMT_PROF: lets the host profile the guest",
	16: "ICSSD: QEMU does not set it up",
	27: "LASS: QEMU does not set it up",
	29: "MIGRATABLE: another TD could take the guest's memory away",
	31: "KL: QEMU does not set it up",
	62: "TPA: QEMU does not set it up",
	63: "PERFMON: QEMU turns the guest's performance counters off",
}

// Config of the platform.
type Config struct {
	// Firmware is the path of a firmware image with TDX metadata; empty: found by QEMU's firmware descriptors.
	Firmware string
	// Descriptors are the directories of firmware descriptors; empty: QEMU's own.
	Descriptors []string
	// Digests are SHA-256 digests (64 hexadecimal digits) of the firmware images that are accepted. With none, no image
	// is accepted.
	Digests []string
	// CPUModel is hypervisor.cpu_model; empty: the VMM's own.
	CPUModel string
	// AllowDebug accepts AttributeDebug, which lets the host read and change the guest.
	AllowDebug bool
	// Attributes of the TD; AttributeSEPTVEDisable must be in them.
	Attributes uint64
	// QuoteSocket of the Quote Generation Service: "unix:/absolute/path", "vsock:CID:PORT", or empty for no quotes.
	QuoteSocket string
	// MROwner and MROwnerConfig are 48 bytes in hexadecimal digits, or empty for zeros.
	MROwner, MROwnerConfig string
	// ACPI is a directory with the ACPI blobs of the VM to be measured (see ReadACPI); empty: RTMR0 is not predicted. Only
	// Measure looks at it. Where it has a directory hypervisor.ACPIDirectory(n), that one is taken for a VM with n virtual CPUs.
	ACPI string
	// Tables makes the ACPI blobs of a VM that is measured, and says in a few words how, as hypervisor.TableMaker does; nil:
	// those of ACPI are taken. It is called for firmware only of which RTMR0 can be predicted with them.
	Tables func(ctx context.Context, doc hypervisor.Document) (tables hypervisor.ACPITables, how string, err error)
}

// Platform is TDX. It holds configuration only; all methods may be called from any goroutine.
type Platform struct {
	cfg                    Config
	quoteSocket            *hypervisor.QuoteSocket
	mrOwner, mrOwnerConfig []byte
	host                   hostprobe.Host
}

// New checks a configuration; all its faults are one error, a tee.Faults.
func New(cfg Config) (*Platform, error) {
	p := &Platform{cfg: cfg}
	faults := attributeFaults(cfg.Attributes, cfg.AllowDebug)
	faults.CheckPaths(append(p.Files(), tee.File{Key: "--acpi", Path: cfg.ACPI}), cfg.Descriptors)
	p.cfg.Digests = faults.Digests("tee.tdx.firmware_digests", cfg.Digests)
	var err error
	if p.quoteSocket, err = parseQuoteSocket(cfg.QuoteSocket); err != nil {
		faults.Add("tee.tdx.quote_socket", fixQuoteSocket, "%q %v", cfg.QuoteSocket, err)
	}
	p.mrOwner = parseDigest(&faults, "tee.tdx.mrowner", cfg.MROwner)
	p.mrOwnerConfig = parseDigest(&faults, "tee.tdx.mrownerconfig", cfg.MROwnerConfig)
	if model, _, _ := strings.Cut(cfg.CPUModel, ","); model != "" && model != "host" {
		faults.Add("hypervisor.cpu_model", `give "" or "host"`, "%q: platform %q takes no model but \"host\"", cfg.CPUModel, tee.TDX)
	}
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return p, nil
}

func attributeFaults(attributes uint64, allowDebug bool) (faults tee.Faults) {
	add := func(fix, format string, a ...any) {
		faults.Add("tee.tdx.attributes", fix, "%#x: "+format, append([]any{attributes}, a...)...)
	}
	for bit := range 64 {
		switch b := uint64(1) << bit; {
		case attributes&b == 0, b == AttributeSEPTVEDisable, b == AttributePKS:
		case b == AttributeDebug:
			if !allowDebug {
				add("clear it, or set tee.allow_debug = true for a test that protects nothing", "bit 0 (DEBUG) lets the host read and change the guest")
			}
		case attributeNames[bit] != "":
			add("clear it", "bit %d is refused (%s)", bit, attributeNames[bit])
		default:
			add("clear it", "bit %d is not known", bit)
		}
	}
	if attributes&AttributeSEPTVEDisable == 0 {
		add(fmt.Sprintf("use %#x", attributes|AttributeSEPTVEDisable),
			"bit 28 (SEPT_VE_DISABLE) is missing: the host could make any access to the guest's memory trap, which Linux guests refuse")
	}
	return faults
}

// maxSocketPath is sun_path without its final NUL, unix(7).
const maxSocketPath = 107

const fixQuoteSocket = `give "unix:/absolute/path", "vsock:CID:PORT", or "" for a guest without quotes`

// parseQuoteSocket reads the address of a Quote Generation Service; nil for the empty text.
func parseQuoteSocket(text string) (*hypervisor.QuoteSocket, error) {
	if text == "" {
		return nil, nil
	}
	kind, rest, _ := strings.Cut(text, ":")
	switch kind {
	case "unix":
		if !filepath.IsAbs(rest) || strings.ContainsRune(rest, 0) {
			return nil, errors.New("has no absolute path")
		}
		if len(rest) > maxSocketPath {
			return nil, fmt.Errorf("has a path of more than %d bytes", maxSocketPath)
		}
		return &hypervisor.QuoteSocket{Path: rest}, nil
	case "vsock":
		cid, port, ok := strings.Cut(rest, ":")
		c, err1 := strconv.ParseUint(cid, 10, 32)
		p, err2 := strconv.ParseUint(port, 10, 32)
		switch {
		case !ok || err1 != nil || err2 != nil:
			return nil, errors.New("has no CID and port, two decimal numbers")
		case c < 2 || c == math.MaxUint32 || p == 0 || p == math.MaxUint32:
			return nil, errors.New("has a CID or port that nobody can listen on")
		}
		return &hypervisor.QuoteSocket{CID: uint32(c), Port: uint32(p)}, nil
	}
	return nil, errors.New("is of no known kind")
}

func parseDigest(faults *tee.Faults, key, text string) []byte {
	if text == "" {
		return nil
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != DigestSize {
		faults.Add(key, fmt.Sprintf("give %d hexadecimal digits", 2*DigestSize), "%q is not %d bytes", text, DigestSize)
		return nil
	}
	return b
}
