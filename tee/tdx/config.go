// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
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
	// Descriptors are the folders of firmware descriptors; empty: QEMU's own.
	Descriptors []string
	// Digests are SHA-256 digests (64 hexadecimal digits) of the firmware images that are accepted. With none, no image
	// is accepted.
	Digests []string
	// AllowDebug accepts AttributeDebug, which lets the host read and change the guest.
	AllowDebug bool
	// Attributes of the TD; AttributeSEPTVEDisable must be in them.
	Attributes uint64
	// QuoteSocket of the Quote Generation Service: "unix:/absolute/path", "vsock:CID:PORT", or empty for no quotes.
	QuoteSocket string
	// MROwner and MROwnerConfig are 48 bytes in hexadecimal digits, or empty for zeros.
	MROwner, MROwnerConfig string
	// ACPI is a folder with the ACPI blobs of the VM to be measured (see ReadACPI); empty: RTMR0 is not predicted. Only
	// Measure looks at it. Where it has a folder ACPIFolder(n), that one is taken for a VM with n virtual CPUs.
	ACPI string
	// Tables makes the ACPI blobs of a VM that is measured, and says in a few words how; nil: those of ACPI are taken. It is
	// called for firmware only of which RTMR0 can be predicted with them.
	Tables func(ctx context.Context, doc hypervisor.Document) (blobs *ACPI, how string, err error)
}

// Platform is TDX. It holds configuration only; all methods may be called from any goroutine.
type Platform struct {
	cfg                    Config
	quoteSocket            *hypervisor.QuoteSocket
	mrOwner, mrOwnerConfig []byte
	host                   hostprobe.Host
}

var digestText = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)

// New checks a configuration; all its faults are one error, errdefs.ErrInvalidArgument.
func New(cfg Config) (*Platform, error) {
	p := &Platform{cfg: cfg}
	faults := attributeFaults(cfg.Attributes, cfg.AllowDebug)
	add := func(err error) {
		if err != nil {
			faults = append(faults, err)
		}
	}
	for name, path := range map[string]string{"firmware": cfg.Firmware, "ACPI folder": cfg.ACPI} {
		if path != "" && !filepath.IsAbs(path) {
			add(fmt.Errorf("the path of the %s, %q, is not absolute", name, path))
		}
	}
	for _, d := range cfg.Descriptors {
		if !filepath.IsAbs(d) {
			add(fmt.Errorf("the folder of firmware descriptors %q is not absolute", d))
		}
	}
	p.cfg.Digests = nil
	for _, d := range cfg.Digests {
		if !digestText.MatchString(d) {
			add(fmt.Errorf("the firmware digest %q is not a SHA-256 digest of 64 hexadecimal digits", d))
		}
		p.cfg.Digests = append(p.cfg.Digests, strings.ToLower(d))
	}
	var err error
	p.quoteSocket, err = parseQuoteSocket(cfg.QuoteSocket)
	add(err)
	p.mrOwner, err = parseDigest("MROWNER", cfg.MROwner)
	add(err)
	p.mrOwnerConfig, err = parseDigest("MROWNERCONFIG", cfg.MROwnerConfig)
	add(err)
	if len(faults) > 0 {
		return nil, refused(faults)
	}
	return p, nil
}

// refused makes one errdefs.ErrInvalidArgument of all reasons.
func refused(faults []error) error {
	return fmt.Errorf("TDX: %w (%w)", errors.Join(faults...), errdefs.ErrInvalidArgument)
}

func attributeFaults(attributes uint64, allowDebug bool) (faults []error) {
	for bit := range 64 {
		switch b := uint64(1) << bit; {
		case attributes&b == 0, b == AttributeSEPTVEDisable, b == AttributePKS:
		case b == AttributeDebug:
			if !allowDebug {
				faults = append(faults, errors.New("attribute bit 0 (DEBUG) lets the host read and change the guest; it is accepted only where debugging is allowed (allow_debug)"))
			}
		case attributeNames[bit] != "":
			faults = append(faults, fmt.Errorf("attribute bit %d is refused (%s)", bit, attributeNames[bit]))
		default:
			faults = append(faults, fmt.Errorf("attribute bit %d is not known", bit))
		}
	}
	if attributes&AttributeSEPTVEDisable == 0 {
		faults = append(faults, fmt.Errorf("attributes %#x lack bit 28 (SEPT_VE_DISABLE): the host could make any access to the guest's memory trap, which Linux guests refuse; use %#x",
			attributes, attributes|AttributeSEPTVEDisable))
	}
	return faults
}

// maxSocketPath is sun_path without its final NUL, unix(7).
const maxSocketPath = 107

func parseQuoteSocket(text string) (*hypervisor.QuoteSocket, error) {
	if text == "" {
		return nil, nil
	}
	fault := func(why string) (*hypervisor.QuoteSocket, error) {
		return nil, fmt.Errorf("the quote socket %q %s; it is unix:/absolute/path, vsock:CID:PORT, or empty for a guest without quotes", text, why)
	}
	kind, rest, _ := strings.Cut(text, ":")
	switch kind {
	case "unix":
		if !filepath.IsAbs(rest) || strings.ContainsRune(rest, 0) {
			return fault("has no absolute path")
		}
		if len(rest) > maxSocketPath {
			return fault(fmt.Sprintf("has a path of more than %d bytes", maxSocketPath))
		}
		return &hypervisor.QuoteSocket{Path: rest}, nil
	case "vsock":
		cid, port, ok := strings.Cut(rest, ":")
		c, err1 := strconv.ParseUint(cid, 10, 32)
		p, err2 := strconv.ParseUint(port, 10, 32)
		switch {
		case !ok || err1 != nil || err2 != nil:
			return fault("has no CID and port, two decimal numbers")
		case c < 2 || c == math.MaxUint32 || p == 0 || p == math.MaxUint32:
			return fault("has a CID or port that nobody can listen on")
		}
		return &hypervisor.QuoteSocket{CID: uint32(c), Port: uint32(p)}, nil
	}
	return fault("is of no known kind")
}

func parseDigest(name, text string) ([]byte, error) {
	if text == "" {
		return nil, nil
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != DigestSize {
		return nil, fmt.Errorf("%s %q is not %d bytes in hexadecimal digits", name, text, DigestSize)
	}
	return b, nil
}
