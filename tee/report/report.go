// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"

	"github.com/cloister-project/cloister/tee/abi"
)

// NonceSize is the size of the field that a report echoes, bytes, on SNP and on TDX.
const NonceSize = 64

// Launch is what the hardware says of this guest's launch.
type Launch struct {
	Platform abi.Platform
	// Bound is the field that the host bound to the launch: 32 bytes (SNP, HOST_DATA), 48 bytes (TDX, MRCONFIGID), nil (SE).
	Bound []byte
	// Debug says that the launch allows the host to look into the guest (SNP policy bit 19, TDX attribute bit 0).
	Debug bool
}

// Hardware is where a guest asks. The zero value is the guest itself; tests have others.
type Hardware struct {
	// Root is put before the paths of files and devices.
	Root string
	// TSM is configfs-tsm's; nil: that of Linux.
	TSM configfsi.Client
	// TDReport asks the TDX module for the TDREPORT with the nonce; nil: the device /dev/tdx_guest.
	TDReport func(nonce [NonceSize]byte) ([]byte, error)
}

// Read asks the hardware for the launch on a platform. The error is errdefs.ErrFailedPrecondition if the hardware is not
// that platform, or cannot be asked.
func (h Hardware) Read(platform abi.Platform) (*Launch, error) {
	var launch *Launch
	var err error
	switch platform {
	case abi.SNP:
		launch, err = h.readSNP()
	case abi.TDX:
		launch, err = h.readTDX()
	case abi.SE:
		launch, err = h.readSE()
	default:
		return nil, fmt.Errorf("platform %.40q has no hardware to ask: %w", platform, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("this guest is not a guest of the platform %s, or its kernel cannot ask the hardware: %w (%w)",
			platform, err, errdefs.ErrFailedPrecondition)
	}
	return launch, nil
}

// nonce is what the report has to echo: an old report, or one of somebody else's, does not.
func nonce() (n [NonceSize]byte) {
	_, _ = rand.Read(n[:]) // never fails, see crypto/rand
	return n
}

// providerSNP is how Linux' sev-guest driver names itself in configfs-tsm.
const providerSNP = "sev_guest"

func (h Hardware) readSNP() (launch *Launch, err error) {
	tsm := h.TSM
	if tsm == nil {
		if tsm, err = linuxtsm.MakeClient(); err != nil {
			return nil, fmt.Errorf("configfs-tsm (is the module sev-guest loaded?): %w", err)
		}
	}
	entry, err := tsm.MkdirTemp(configfsi.TsmPrefix+"/report", "cloister")
	if err != nil {
		return nil, fmt.Errorf("make an entry in configfs-tsm: %w", err)
	}
	defer func() { err = errors.Join(err, tsm.RemoveAll(entry)) }()
	provider, err := tsm.ReadFile(filepath.Join(entry, "provider"))
	if err != nil {
		return nil, fmt.Errorf("ask configfs-tsm for its provider: %w", err)
	}
	if p := strings.TrimSuffix(string(provider), "\n"); p != providerSNP {
		return nil, fmt.Errorf("configfs-tsm's provider is %.40q, not %q", p, providerSNP)
	}
	// Below a service module (SVSM) the kernel runs at another level than the default, 0, and may only ask for that.
	if floor, err := tsm.ReadFile(filepath.Join(entry, "privlevel_floor")); err == nil {
		if level := bytes.TrimSpace(floor); len(level) > 0 && string(level) != "0" {
			if err := tsm.WriteFile(filepath.Join(entry, "privlevel"), level); err != nil {
				return nil, fmt.Errorf("ask for a report of privilege level %.8q: %w", level, err)
			}
		}
	}
	n := nonce()
	if err := tsm.WriteFile(filepath.Join(entry, "inblob"), n[:]); err != nil {
		return nil, fmt.Errorf("ask for a report: %w", err)
	}
	raw, err := tsm.ReadFile(filepath.Join(entry, "outblob"))
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	return parseSNP(raw, n)
}

func (h Hardware) readTDX() (*Launch, error) {
	ask := h.TDReport
	if ask == nil {
		ask = h.tdreport
	}
	n := nonce()
	raw, err := ask(n)
	if err != nil {
		return nil, fmt.Errorf("ask the TDX module for a report (is the module tdx-guest loaded?): %w", err)
	}
	return parseTDX(raw, n)
}

// protVirtGuest holds "1" where the kernel runs under the ultravisor (Linux, arch/s390/kernel/uv.c).
const protVirtGuest = "/sys/firmware/uv/prot_virt_guest"

func (h Hardware) readSE() (*Launch, error) {
	text, err := os.ReadFile(h.Root + protVirtGuest)
	if err != nil {
		return nil, fmt.Errorf("the kernel knows of no ultravisor: %w", err)
	}
	if s := strings.TrimSpace(string(text)); s != "1" {
		return nil, fmt.Errorf("%s is %.20q, not 1: the ultravisor does not protect this guest", protVirtGuest, s)
	}
	return &Launch{Platform: abi.SE}, nil
}
