// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/firmware"
)

// Limits of boot files in bytes, far above what guests have.
const (
	maxKernel = 256 << 20
	maxInitrd = 2 << 30
)

// Measure predicts what a report of the prepared document will hold.
func (p *Platform) Measure(ctx context.Context, doc hypervisor.Document) (*tee.ReferenceValues, error) {
	all, err := p.MeasureRange(ctx, doc, doc.CPU.Count, doc.CPU.Count)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// MeasureRange is Measure for the document with each number of virtual CPUs from first to last; the files are read once.
func (p *Platform) MeasureRange(ctx context.Context, doc hypervisor.Document, first, last int) ([]*tee.ReferenceValues, error) {
	if doc.Confidential == nil || doc.Confidential.SNP == nil || doc.Boot.Firmware == "" {
		return nil, fmt.Errorf("measure: the VM is not prepared for SEV-SNP: %w", errdefs.ErrInvalidArgument)
	}
	s := doc.Confidential.SNP
	launches, err := p.launches(ctx, doc, first, last)
	if err != nil {
		return nil, fmt.Errorf("measure: %w", err)
	}
	var keys []tee.Value
	if s.IDBlock != nil {
		v, err := VerifyIDBlock(s.IDBlock, s.IDAuth, s.AuthorKey)
		if err != nil {
			return nil, fmt.Errorf("measure: %w", err)
		}
		if n := doc.CPU.Count; n >= first && n <= last && v.Identity.Digest != launches[n-first].digest {
			return nil, fmt.Errorf("measure: the ID block is of another launch, %x; this one is %x: %w", v.Identity.Digest,
				launches[n-first].digest, errdefs.ErrFailedPrecondition)
		}
		keys = append(keys, tee.Value{Name: "snp.id_key_digest", Hex: hex.EncodeToString(v.IDKeyDigest[:]),
			Note: "the key that signed the ID block"})
		if v.AuthorKeyDigest != nil {
			keys = append(keys, tee.Value{Name: "snp.author_key_digest", Hex: hex.EncodeToString(v.AuthorKeyDigest[:]),
				Note: "the key that signed the ID key"})
		}
	}
	policy := binary.LittleEndian.AppendUint64(nil, s.Policy) // as the report has it
	// Without initdata the report has zeros, and a verifier has to see that: another document would be the host's.
	hostData := tee.Value{Name: "snp.host_data", Hex: strings.Repeat("00", abi.SNPHostDataSize), Note: "there is no initdata"}
	if s.HostData != nil {
		hostData.Hex, hostData.Note = hex.EncodeToString(s.HostData), "the initdata's digest"
	}
	note := "MEASUREMENT of the report"
	if p.config.IGVM {
		note += ", as Cloud Hypervisor launches the IGVM file; never compared with a report"
	}
	all := make([]*tee.ReferenceValues, 0, len(launches))
	for i, l := range launches {
		values := []tee.Value{
			{Name: "snp.launch_digest", Hex: hex.EncodeToString(l.digest[:]), Note: note},
			hostData,
			{Name: "snp.policy", Hex: hex.EncodeToString(policy), Note: Policy(s.Policy).String()},
		}
		all = append(all, &tee.ReferenceValues{
			Platform: tee.SNP, VCPUs: first + i, CPUModel: doc.CPU.Model,
			Values: append(values, keys...), Inputs: l.inputs, Parameters: commandLine(doc),
		})
	}
	return all, nil
}

// commandLine is what the hypervisor's driver gives to the kernel.
func commandLine(doc hypervisor.Document) string { return strings.Join(doc.Boot.Parameters, " ") }

// measured is the launch with one number of virtual CPUs.
type measured struct {
	digest Digest
	inputs []tee.Input
}

// launches are those of a document with each number of virtual CPUs from first to last.
func (p *Platform) launches(ctx context.Context, doc hypervisor.Document, first, last int) (all []measured, err error) {
	if p.config.IGVM {
		return p.igvmLaunches(ctx, doc, first, last)
	}
	l, inputs, err := p.launch(ctx, doc)
	if err != nil {
		return nil, err
	}
	digests, err := l.Digests(first, last)
	if err != nil {
		return nil, err
	}
	for _, d := range digests {
		all = append(all, measured{d, inputs})
	}
	return all, nil
}

// launch reads what a document's launch from a firmware image is measured from.
func (p *Platform) launch(ctx context.Context, doc hypervisor.Document) (Launch, []tee.Input, error) {
	signature, err := CPUSignature(doc.CPU.Model)
	if err != nil {
		return Launch{}, nil, err
	}
	image, digest, err := firmware.ReadFile(doc.Boot.Firmware, firmware.MaxSize)
	if err != nil {
		return Launch{}, nil, fmt.Errorf("firmware: %w", err)
	}
	l := Launch{Firmware: image, CPUSignature: signature, GuestFeatures: p.config.GuestFeatures}
	inputs := []tee.Input{{Role: "firmware", Path: doc.Boot.Firmware, SHA256: digest}}
	if !doc.Confidential.SNP.KernelHashes {
		return l, inputs, nil
	}
	hashes, booted, err := bootHashes(ctx, doc)
	if err != nil {
		return Launch{}, nil, err
	}
	l.Hashes = &hashes
	return l, append(inputs, booted...), nil
}

// bootHashes are the hashes of what a document boots, and its files.
func bootHashes(ctx context.Context, doc hypervisor.Document) (hashes Hashes, inputs []tee.Input, err error) {
	if err := checkKernel(doc.Boot.Kernel); err != nil {
		return Hashes{}, nil, err
	}
	// The hash of no initrd is that of nothing.
	hashes = Hashes{Parameters: HashParameters(commandLine(doc)), Initrd: sha256.Sum256(nil)}
	for _, f := range []struct {
		role, path string
		max        int64
		to         *[sha256.Size]byte
	}{{"kernel", doc.Boot.Kernel, maxKernel, &hashes.Kernel}, {"initrd", doc.Boot.Initrd, maxInitrd, &hashes.Initrd}} {
		if f.path == "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return Hashes{}, nil, err
		}
		digest, err := firmware.DigestFile(f.path, f.max)
		if err != nil {
			return Hashes{}, nil, fmt.Errorf("%s: %w", f.role, err)
		}
		if _, err := hex.Decode(f.to[:], []byte(digest)); err != nil {
			return Hashes{}, nil, err
		}
		inputs = append(inputs, tee.Input{Role: f.role, Path: f.path, SHA256: digest})
	}
	return hashes, inputs, nil
}

// checkKernel wants a bzImage, which is what OVMF boots: Documentation/arch/x86/boot.rst, the header's magic at 0x202.
func checkKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	defer f.Close()
	head := make([]byte, 0x206)
	if _, err := io.ReadFull(f, head); err != nil || !bytes.Equal(head[0x202:], []byte("HdrS")) {
		return fmt.Errorf("kernel %s is no bzImage, which the firmware needs: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}
