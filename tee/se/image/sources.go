// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Limits of what goes into an image, in bytes.
const (
	MaxKernel = 128 << 20
	MaxInitrd = 768 << 20
	MaxStage  = 64 << 10
	// CCKSize is a customer communication key's.
	CCKSize = 32

	kernelMagicAt    = 0x10008
	kernelMagic      = "S390EP"
	kernelLineSizeAt = 0x10430
	legacyLineSize   = 896
	maxLineSize      = 64 << 10
	stage3aName      = "stage3a.bin"
	stage3bName      = "stage3b_reloc.bin"
	minStage3a       = stage3aEntry - stage3aAddress + stage3aArgs
)

// Sources are the files that an image is made of.
type Sources struct {
	// Kernel is a raw s390x kernel ("image" or "bzImage"), not an ELF file.
	Kernel []byte
	// Initrd may be empty.
	Initrd []byte
	// Stage3a and Stage3b are the boot stubs stage3a.bin and stage3b_reloc.bin of s390-tools.
	Stage3a, Stage3b []byte
}

// ReadSources reads the files; initrd may be "". stubs is the directory of the boot stubs, /usr/share/s390-tools/pvimg where
// s390-tools is installed.
func ReadSources(kernel, initrd, stubs string) (*Sources, error) {
	var s Sources
	for _, f := range []struct {
		path string
		max  int64
		to   *[]byte
	}{
		{kernel, MaxKernel, &s.Kernel},
		{initrd, MaxInitrd, &s.Initrd},
		{filepath.Join(stubs, stage3aName), MaxStage, &s.Stage3a},
		{filepath.Join(stubs, stage3bName), MaxStage, &s.Stage3b},
	} {
		if f.path == "" {
			continue
		}
		b, _, err := firmware.ReadFile(f.path, f.max)
		if err != nil {
			return nil, err
		}
		*f.to = b
	}
	return &s, s.check()
}

// check refuses what would not boot, where that can be seen.
func (s *Sources) check() error {
	fault := func(format string, a ...any) error {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	switch {
	case bytes.HasPrefix(s.Kernel, []byte("\x7fELF")):
		return fault("the kernel is an ELF file; a raw kernel image is needed (vmlinuz of an s390x distribution, arch/s390/boot/bzImage)")
	case len(s.Kernel) < kernelLineSizeAt+8 || string(s.Kernel[kernelMagicAt:kernelMagicAt+len(kernelMagic)]) != kernelMagic:
		return fault("the kernel is no raw s390x kernel image: %q is not at 0x%x", kernelMagic, kernelMagicAt)
	case len(s.Kernel) > MaxKernel || len(s.Initrd) > MaxInitrd:
		return fault("kernel or initrd is too large: at most %d and %d bytes", MaxKernel, MaxInitrd)
	case len(s.Stage3a) < minStage3a || len(s.Stage3a) > MaxStage || !allZero(s.Stage3a[len(s.Stage3a)-stage3aArgs:]):
		return fault("%s is not the boot stub of s390-tools: it has %d bytes or no room for arguments at its end", stage3aName, len(s.Stage3a))
	case len(s.Stage3b) <= stage3bArgs || len(s.Stage3b) > MaxStage || !allZero(s.Stage3b[len(s.Stage3b)-stage3bArgs:]):
		return fault("%s is not the boot stub of s390-tools: it has %d bytes or no room for arguments at its end", stage3bName, len(s.Stage3b))
	}
	return nil
}

// maxParameters is how long a command line the kernel takes, with the NUL at its end.
func (s *Sources) maxParameters() int {
	n := binary.BigEndian.Uint64(s.Kernel[kernelLineSizeAt:])
	if n == 0 {
		return legacyLineSize
	}
	return int(min(n, maxLineSize))
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
