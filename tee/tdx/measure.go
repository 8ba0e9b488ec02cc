// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
)

// Notes on the values: what they hold for.
const (
	noteSinglePass = "if KVM measures each page as it is added (Linux 6.16 and later)"
	noteTwoPass    = "if KVM measures a section after all its pages are added (older kernels with TDX patches)"
	noteRTMR0      = "for these ACPI tables only, which change with QEMU's version and the VM's CPUs, memory and devices: "
	noteGiven      = "those that were given"
	noteRTMR1      = "for QEMU 10.0 and later; older ones change the kernel's header"
	noteRTMR2      = "for Linux 6.9 and later; older kernels leave it zero"
	noteAttributes = "QEMU adds PKS (bit 30) where the CPU and KVM offer it, so that a verifier should accept both"
	noteConfigID   = "the initdata's digest, cut or padded with zeros to 48 bytes"
	noteNoConfigID = "there is no initdata"
)

// Measure predicts the registers of a prepared document. A register that cannot be computed is among the
// unpredicted ones, with the reason.
func (p *Platform) Measure(ctx context.Context, doc hypervisor.Document) (*tee.ReferenceValues, error) {
	c := doc.Confidential
	if c == nil || c.TDX == nil || doc.Boot.Firmware == "" {
		return nil, fmt.Errorf("the document was not prepared for TDX: %w", errdefs.ErrInvalidArgument)
	}
	fw, err := readImage(doc.Boot.Firmware)
	if err != nil {
		return nil, err
	}
	out := &tee.ReferenceValues{
		Platform:   tee.TDX,
		VCPUs:      doc.CPU.Count,
		CPUModel:   doc.CPU.Model,
		Parameters: strings.Join(doc.Boot.Parameters, " "),
		Inputs:     []tee.Input{{Role: "firmware", Path: fw.path, SHA256: fw.digest}},
	}
	kernel, err := input(out, "kernel", doc.Boot.Kernel)
	if err != nil {
		return nil, err
	}
	initrd, err := input(out, "initrd", doc.Boot.Initrd)
	if err != nil {
		return nil, err
	}

	single, two := MRTD(fw.raw, fw.parsed)
	add := func(name, hex, note string) {
		out.Values = append(out.Values, tee.Value{Name: name, Hex: hex, Note: note})
	}
	add("tdx.mrtd", single.String(), noteSinglePass)
	add("tdx.mrtd_two_pass", two.String(), noteTwoPass)

	prof, profErr := readProfile(fw.raw)
	if profErr == nil && !prof.measures {
		profErr = fmt.Errorf("this firmware has no driver that extends the registers (TdTcg2Dxe): %w", errdefs.ErrNotImplemented)
	}
	register := func(name, note string, events func() ([]Event, string, error)) error {
		var list []Event
		var more string
		err := profErr
		if err == nil {
			list, more, err = events()
		}
		var wanted *tablesError
		switch {
		case errors.As(err, &wanted):
			return fmt.Errorf("%s: %w", name, err)
		case err == nil:
			add(name, Extend(list...).String(), note+more)
		case errdefs.IsNotImplemented(err), errdefs.IsNotFound(err):
			out.Unpredicted = append(out.Unpredicted, tee.Unpredicted{Name: name, Reason: err.Error()})
		default:
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	for _, r := range []struct {
		name, note string
		events     func() ([]Event, string, error)
	}{
		{"tdx.rtmr0", noteRTMR0, func() ([]Event, string, error) {
			// Where more than the tables is not known, they are not looked for.
			if _, err := rtmr0(fw, prof, doc.Memory.Bytes, &ACPI{}); err != nil {
				return nil, "", err
			}
			acpi, how, err := p.acpi(ctx, doc)
			if err != nil {
				return nil, "", err
			}
			list, err := rtmr0(fw, prof, doc.Memory.Bytes, acpi)
			return list, how, err
		}},
		{"tdx.rtmr1", noteRTMR1, func() ([]Event, string, error) {
			list, err := rtmr1(prof, kernel)
			return list, "", err
		}},
		{"tdx.rtmr2", noteRTMR2, func() ([]Event, string, error) {
			list, err := rtmr2(prof, out.Parameters, initrd)
			return list, "", err
		}},
	} {
		if err := register(r.name, r.note, r.events); err != nil {
			return nil, err
		}
	}

	configID, note := c.TDX.MRConfigID, noteConfigID
	if configID == nil {
		configID, note = make([]byte, DigestSize), noteNoConfigID
	}
	add("tdx.mrconfigid", hex.EncodeToString(configID), note)
	add("tdx.attributes", hex.EncodeToString(binary.LittleEndian.AppendUint64(nil, c.TDX.Attributes)),
		fmt.Sprintf("%#x; %s", c.TDX.Attributes, noteAttributes))
	return out, nil
}

// tablesError: blobs were to be made, which failed. It is never told as a register that cannot be predicted.
type tablesError struct{ err error }

func (e *tablesError) Error() string { return e.err.Error() }
func (e *tablesError) Unwrap() error { return e.err }

// acpi are the configured blobs and where they come from, nil if there are none.
func (p *Platform) acpi(ctx context.Context, doc hypervisor.Document) (a *ACPI, how string, err error) {
	dir := p.cfg.ACPI
	switch {
	case p.cfg.Tables != nil:
		var made hypervisor.ACPITables
		if made, how, err = p.cfg.Tables(ctx, doc); err == nil {
			a = (*ACPI)(&made)
			err = a.check()
		}
		if err != nil {
			return nil, "", &tablesError{err}
		}
	case dir == "":
		return nil, "", nil
	default:
		if sized := filepath.Join(dir, hypervisor.ACPIDirectory(doc.CPU.Count)); isDirectory(sized) {
			dir = sized
		}
		if a, err = ReadACPI(dir); err != nil {
			return nil, "", err
		}
		how = noteGiven
	}
	switch n, err := a.cpus(); {
	case err != nil:
		return nil, "", err
	case n == doc.CPU.Count:
		return a, how, nil
	case p.cfg.Tables != nil:
		return nil, "", &tablesError{fmt.Errorf("the ACPI tables of %s are of a VM with %d CPUs, this one has %d: %w", how, n, doc.CPU.Count,
			errdefs.ErrInternal)}
	default:
		return nil, "", fmt.Errorf("the ACPI tables in %s are of a VM with %d CPUs, this one has %d: %w", dir, n, doc.CPU.Count,
			errdefs.ErrNotImplemented)
	}
}

func isDirectory(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// input reads a boot file and lists it. An empty path gives nil.
func input(out *tee.ReferenceValues, role, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	content, digest, err := firmware.ReadFile(path, maxKernel)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", role, err)
	}
	out.Inputs = append(out.Inputs, tee.Input{Role: role, Path: path, SHA256: digest})
	return content, nil
}
