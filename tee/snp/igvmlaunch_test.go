// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/snp/igvm"
	"github.com/cloister-project/cloister/tee/snp/igvm/igvmtest"
)

func page(b byte) []byte { return bytes.Repeat([]byte{b}, pageSize) }

// resetState is the state of a virtual CPU after a reset, as a builder of IGVM files has it, without what KVM adds.
func resetState(eip uint32, features uint64) []byte {
	state := vmsa(eip, 0, features)
	binary.LittleEndian.PutUint64(state[0x0d0:], 0)
	binary.LittleEndian.PutUint64(state[0x148:], 0)
	binary.LittleEndian.PutUint64(state[0x158:], 0x60000010)
	return state
}

func igvmFile(policy uint64, cpus int, change func(*igvmtest.Builder)) []byte {
	b := igvmtest.New(policy)
	b.Page(0xfffff000, 0, 0, page(0xf0))
	b.Page(0xf000, 0, 0, page(0x0f))
	b.Page(0x11000, 1, 0, nil)
	b.Page(0x12000, 2, 0, page(0x77))
	b.Parameters(0x13000, 0)
	for n := range cpus {
		b.VP(uint16(n), resetState(bspEIP, 1))
	}
	if change != nil {
		change(b)
	}
	return b.Bytes()
}

// The digest, step by step as 56860 has it: the pages in the order of their addresses, the table in its place, and each CPU.
func TestIGVMDigest(t *testing.T) {
	f, err := igvm.Parse(igvmFile(0x30000, 2, nil))
	require.NoError(t, err)
	l := IGVMLaunch{File: f, Hashes: Hashes{Kernel: [32]byte{1}, Initrd: [32]byte{2}, Parameters: [32]byte{3}}}
	got, err := l.Digest()
	require.NoError(t, err)

	var c launchContext
	c.normal(0xf000, page(0x0f))
	hashes := make([]byte, pageSize)
	table := l.Hashes.Table()
	copy(hashes[0xc00:], table[:])
	c.normal(0x10000, hashes)
	c.page(5, 0x11000, Digest{})
	c.page(6, 0x12000, Digest{})
	c.page(4, 0x13000, Digest{})
	c.normal(0xfffff000, page(0xf0))
	// What KVM makes of a state after a reset is what it makes of QEMU's.
	for range 2 {
		c.page(2, 0xfffffffff000, Digest(sha512.Sum384(vmsa(bspEIP, 0, 1))))
	}
	require.Equal(t, c.ld, got)

	// A page of the file's in the table's place keeps its content but for the block.
	f, err = igvm.Parse(igvmFile(0x30000, 2, func(b *igvmtest.Builder) { b.Page(0x10000, 0, 0, page(0xee)) }))
	require.NoError(t, err)
	l.File = f
	pages, err := l.pages()
	require.NoError(t, err)
	content := pages[1].Data
	require.Equal(t, page(0xee)[:0xc00], content[:0xc00])
	require.Equal(t, hashes[0xc00:], content[0xc00:])
	require.Equal(t, page(0xee), f.Pages[1].Data, "the file is not touched")
}

func TestLaunchedVMSA(t *testing.T) {
	require.Equal(t, vmsa(bspEIP, 0x800f12, 5), launchedVMSA(func() []byte {
		s := resetState(bspEIP, 4)
		binary.LittleEndian.PutUint32(s[0x310:], 0x800f12) // rdx
		return s
	}()))
	// Each byte that is handed to KVM counts, no other does.
	base := launchedVMSA(make([]byte, pageSize))
	counts := 0
	for i := range pageSize {
		state := make([]byte, pageSize)
		state[i] = 0x08
		if !bytes.Equal(base, launchedVMSA(state)) {
			counts++
		}
	}
	// 6 segments, LDTR and TR of 16 bytes, two descriptor tables of 10; 8 control and special registers and 14 general ones of
	// 8 bytes, and the features.
	require.Equal(t, 8*16+2*10+8*8+14*8+8, counts)
}

func TestIGVMHashesUnmeasured(t *testing.T) {
	f, err := igvm.Parse(igvmFile(0x30000, 1, func(b *igvmtest.Builder) { b.Page(0x10000, 0, 2, nil) }))
	require.NoError(t, err)
	_, err = IGVMLaunch{File: f}.Digest()
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "0x10000 that is not measured")
}

// igvmSetup is newSetup with IGVM files for 1 and 2 virtual CPUs.
func igvmSetup(t *testing.T) setup {
	t.Helper()
	s := newSetup(t)
	dir := t.TempDir()
	s.config.IGVM, s.config.Firmware, s.config.Digests = true, filepath.Join(dir, "snp-%d.igvm"), nil
	for cpus := 1; cpus <= 2; cpus++ {
		s.addIGVM(t, cpus, igvmFile(0x30000, cpus, nil))
	}
	s.doc.CPU.Model = ""
	return s
}

func (s *setup) addIGVM(t *testing.T, cpus int, content []byte) {
	t.Helper()
	_, digest := write(t, "x", content)
	require.NoError(t, os.WriteFile(fmt.Sprintf(s.config.Firmware, cpus), content, 0o600))
	s.config.Digests = append(s.config.Digests, digest)
}

func TestIGVMPrepareAndMeasure(t *testing.T) {
	s := igvmSetup(t)
	p := s.platform(t)
	require.Empty(t, p.CPUModel())
	doc := s.doc
	require.NoError(t, p.Prepare(t.Context(), &doc, tee.Inputs{InitdataDigest: page(0xcd)[:32]}))
	require.Equal(t, fmt.Sprintf(s.config.Firmware, 2), doc.Boot.Firmware)
	require.True(t, doc.Confidential.SNP.KernelHashes)

	all, err := p.MeasureRange(t.Context(), doc, 1, 2)
	require.NoError(t, err)
	require.Len(t, all, 2)
	for i, v := range all {
		require.Equal(t, i+1, v.VCPUs)
		require.Equal(t, fmt.Sprintf(s.config.Firmware, i+1), v.Inputs[0].Path)
		require.Equal(t, strings.Repeat("cd", 32), value(t, v, "snp.host_data"))
		require.Equal(t, "0000030000000000", value(t, v, "snp.policy"))
	}
	one := value(t, all[1], "snp.launch_digest")
	require.NotEqual(t, value(t, all[0], "snp.launch_digest"), one)

	// The command line is measured.
	doc.Boot.Parameters = append(doc.Boot.Parameters, "debug")
	v, err := p.Measure(t.Context(), doc)
	require.NoError(t, err)
	require.NotEqual(t, one, value(t, v, "snp.launch_digest"))

	f := p.probeFirmware()
	require.Equal(t, tee.OK, f.Result, f.Detail)
	require.Contains(t, f.Detail, "for 1, 2 virtual CPUs")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = p.MeasureRange(ctx, doc, 1, 2)
	require.ErrorIs(t, err, context.Canceled)
	_, err = p.MeasureRange(t.Context(), doc, 1, 3)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = p.MeasureRange(t.Context(), doc, 0, 3)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestIGVMRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		file []byte
		want string
	}{
		"other number of CPUs": {igvmFile(0x30000, 2, nil), "it is for 2 virtual CPUs, not 3"},
		"other policy":         {igvmFile(0xb0000, 3, nil), "its guest policy is 0xb0000, and tee.snp.policy 0x30000"},
		"damaged":              {[]byte("IGVM"), "does not begin as one"},
		"hashes unmeasured":    {igvmFile(0x30000, 3, func(b *igvmtest.Builder) { b.Page(0x10000, 0, 2, nil) }), "not measured"},
	} {
		t.Run(name, func(t *testing.T) {
			s := igvmSetup(t)
			s.addIGVM(t, 3, tc.file)
			s.doc.CPU.Count = 3
			doc := s.doc
			err := s.platform(t).Prepare(t.Context(), &doc, tee.Inputs{})
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.want)
			require.Equal(t, s.doc, doc, "the document is as before")
			f := s.platform(t).probeFirmware()
			require.Equal(t, tee.Missing, f.Result)
			require.Contains(t, f.Detail, tc.want)
			require.NotEmpty(t, f.Fix)
		})
	}
	s := igvmSetup(t)
	s.config.Digests = s.config.Digests[:1]
	doc := s.doc
	err := s.platform(t).Prepare(t.Context(), &doc, tee.Inputs{})
	require.ErrorContains(t, err, "none of the 1 accepted ones")
	s.config.Firmware = filepath.Join(t.TempDir(), "%d")
	err = s.platform(t).Prepare(t.Context(), &doc, tee.Inputs{})
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Equal(t, tee.Missing, s.platform(t).probeFirmware().Result)
}

func TestIGVMSettings(t *testing.T) {
	s := igvmSetup(t)
	s.withKeys(t)
	s.config.Firmware = "/x/OVMF.fd"
	_, err := New(s.config)
	require.ErrorContains(t, err, `"/x/OVMF.fd" is not the path of IGVM files`)
	require.ErrorContains(t, err, "tee.snp.id_key")
}
