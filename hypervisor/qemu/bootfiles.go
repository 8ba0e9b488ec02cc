// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
	"github.com/cloister-project/cloister/hypervisor/pvh"
)

// Offsets in a raw s390x kernel image, arch/s390/boot/head.S of Linux.
const (
	s390MagicOffset       = 0x10008
	s390Magic             = "S390EP"
	s390CommandLineOffset = 0x10430 // maximum size with the final NUL, 64 bits, big endian
	s390OldCommandLine    = 896     // of kernels that have 0 there
	s390HeaderEnd         = s390CommandLineOffset + 8
	// s390CommandLineLimit bounds what a header may say.
	s390CommandLineLimit = 1 << 20
)

// bootFiles checks what the document's boot part names on the host.
func bootFiles(f *hypervisor.Faults, doc hypervisor.Document) {
	b := doc.Boot
	switch {
	case b.Sealed:
		hostcheck.BootFile(f, "boot.kernel", b.Kernel)
	case doc.Arch() == hypervisor.ArchS390X:
		limit, err := s390CommandLineSize(b.Kernel)
		if err != nil {
			f.Add("boot.kernel: %w", err)
		} else if n := len(strings.Join(b.Parameters, " ")) + 1; n > limit {
			f.Add("boot.parameters have %d bytes, the kernel takes %d", n-1, limit-1)
		}
	default:
		kind, err := pvh.Inspect(b.Kernel)
		if err != nil {
			f.Add("boot.kernel: %w", err)
		} else if kind == pvh.Vmlinux && b.Firmware != "" {
			f.Add("boot.kernel: %s is an ELF file, which a VM with boot.firmware cannot start; give it the bzImage", b.Kernel)
		}
	}
	if !b.Sealed {
		hostcheck.BootFile(f, "boot.initrd", b.Initrd)
	}
	if b.Firmware != "" {
		hostcheck.BootFile(f, "boot.firmware", b.Firmware)
	}
}

// s390CommandLineSize returns the bytes that a raw s390x kernel takes as its command line, with the final NUL.
func s390CommandLineSize(path string) (int, error) {
	// A FIFO in place of the kernel must not block the open.
	if fi, err := os.Stat(path); err != nil {
		return 0, err
	} else if !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	r, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	head := make([]byte, s390HeaderEnd)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	if n < len(head) || string(head[s390MagicOffset:s390MagicOffset+len(s390Magic)]) != s390Magic {
		return 0, fmt.Errorf("%s is no raw s390x kernel image (no %q at %#x); take arch/s390/boot/bzImage, not the ELF file: %w",
			path, s390Magic, s390MagicOffset, errdefs.ErrInvalidArgument)
	}
	switch size := binary.BigEndian.Uint64(head[s390CommandLineOffset:]); {
	case size == 0:
		return s390OldCommandLine, nil
	case size > s390CommandLineLimit:
		return 0, fmt.Errorf("%s says that it takes a command line of %d bytes; it is damaged: %w", path, size, errdefs.ErrInvalidArgument)
	default:
		return int(size), nil
	}
}
