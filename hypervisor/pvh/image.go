// SPDX-License-Identifier: Apache-2.0

package pvh

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxKernel bounds the uncompressed kernel, in bytes.
const maxKernel = 512 << 20

// Offsets in the setup header, Documentation/arch/x86/boot.rst of Linux.
const (
	offSetupSects    = 0x1f1
	offBootFlag      = 0x1fe
	offHdrS          = 0x202
	offVersion       = 0x206
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	setupHeaderEnd   = 0x250

	sectorSize = 512
	// payload_offset and payload_length are there since this version of the boot protocol.
	minVersion = 0x0208
)

// Kind is what a kernel file is.
type Kind int

// Kinds of kernel files.
const (
	// BzImage is a Linux boot image for x86, most often with a compressed vmlinux in it.
	BzImage Kind = iota + 1
	// Vmlinux is an x86-64 ELF file with a PVH entry point.
	Vmlinux
)

// Inspect tells what the kernel file at path is. It reads headers only. A file that is neither a bzImage nor a PVH
// kernel gives errdefs.ErrInvalidArgument.
func Inspect(path string) (Kind, error) {
	f, size, err := openRegular(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return inspect(f, size, path)
}

func inspect(r io.ReaderAt, size int64, path string) (Kind, error) {
	magic := make([]byte, setupHeaderEnd)
	n, err := r.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read kernel %s: %w", path, err)
	}
	magic = magic[:n]
	switch {
	case bytes.HasPrefix(magic, []byte("\x7fELF")):
		if err := checkPVH(r, size); err != nil {
			return 0, fmt.Errorf("kernel %s is an ELF file that cannot be booted directly: %w", path, err)
		}
		return Vmlinux, nil
	case len(magic) == setupHeaderEnd && isBzImage(magic):
		return BzImage, nil
	}
	return 0, fmt.Errorf("%s is not a kernel that can be booted: neither a bzImage (no \"HdrS\" at 0x202) nor an ELF file: %w",
		path, errdefs.ErrInvalidArgument)
}

func isBzImage(hdr []byte) bool {
	return binary.LittleEndian.Uint16(hdr[offBootFlag:]) == 0xaa55 && string(hdr[offHdrS:offHdrS+4]) == "HdrS"
}

func openRegular(path string) (*os.File, int64, error) {
	// A FIFO or a device in place of the kernel must not block the open.
	fi, err := os.Stat(path)
	if err != nil {
		return nil, 0, fmt.Errorf("kernel: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("kernel %s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("kernel: %w", err)
	}
	fi, err = f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("kernel: %w", err)
	}
	return f, fi.Size(), nil
}

// payload finds the compressed kernel in a bzImage of size bytes. ok is false where the image is too old to tell.
func payload(r io.ReaderAt, size int64) (sec *io.SectionReader, ok bool, err error) {
	hdr := make([]byte, setupHeaderEnd)
	if _, err := r.ReadAt(hdr, 0); err != nil {
		return nil, false, fmt.Errorf("setup header: %w", err)
	}
	if !isBzImage(hdr) {
		return nil, false, fmt.Errorf("no bzImage: %w", errdefs.ErrInvalidArgument)
	}
	if binary.LittleEndian.Uint16(hdr[offVersion:]) < minVersion {
		return nil, false, nil
	}
	sects := int64(hdr[offSetupSects])
	if sects == 0 {
		sects = 4
	}
	off := int64(binary.LittleEndian.Uint32(hdr[offPayloadOffset:]))
	length := int64(binary.LittleEndian.Uint32(hdr[offPayloadLength:]))
	if length == 0 {
		return nil, false, nil
	}
	start := (sects+1)*sectorSize + off
	if start > size || length > size-start {
		return nil, false, fmt.Errorf("the payload (offset %d, %d bytes) is outside of the file of %d bytes; the image is truncated or "+
			"damaged: %w",
			start, length, size, errdefs.ErrInvalidArgument)
	}
	return io.NewSectionReader(r, start, length), true, nil
}

// The payload's formats. All but gzip are followed by the size of the uncompressed kernel, 4 bytes, which is not part
// of the stream (scripts/Makefile.lib of Linux, size_append; gzip has it in its own trailer).
var (
	magicGzip  = []byte{0x1f, 0x8b}
	magicXZ    = []byte{0xfd, '7', 'z', 'X', 'Z', 0}
	magicZstd  = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicLZ4   = []byte{0x02, 0x21, 0x4c, 0x18}
	magicBzip2 = []byte("BZh")
	magicLZMA  = []byte{0x5d, 0, 0}
	magicLZO   = []byte{0x89, 'L', 'Z', 'O'}
	magicELF   = []byte("\x7fELF")
)

const sizeTrailer = 4

// decompress writes the payload's kernel to w, at most maxKernel bytes.
func decompress(w io.Writer, sec *io.SectionReader) error {
	magic := make([]byte, 6)
	n, err := sec.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	magic = magic[:n]
	body := io.Reader(io.NewSectionReader(sec, 0, max(sec.Size()-sizeTrailer, 0)))

	var from io.Reader
	switch {
	case bytes.HasPrefix(magic, magicZstd):
		// One goroutine and small buffers: this may run in a shim. The kernel is built with a window of up to 128 MiB.
		z, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return damaged("zstd", err)
		}
		defer z.Close()
		from = z
	case bytes.HasPrefix(magic, magicGzip):
		z, err := gzip.NewReader(sec)
		if err != nil {
			return damaged("gzip", err)
		}
		defer z.Close()
		z.Multistream(false)
		from = z
	case bytes.HasPrefix(magic, magicXZ):
		if err := checkXZ(sec); err != nil {
			return err
		}
		z, err := xz.ReaderConfig{SingleStream: true}.NewReader(body)
		if err != nil {
			return damaged("xz", err)
		}
		from = z
	case bytes.HasPrefix(magic, magicELF):
		from = body
	default:
		return unsupported(compressionName(magic))
	}
	copied, err := io.Copy(w, io.LimitReader(from, maxKernel+1))
	if err != nil {
		var we *writeError
		if errors.As(err, &we) {
			return we.err
		}
		return damaged("payload", err)
	}
	if copied > maxKernel {
		return fmt.Errorf("the uncompressed kernel is larger than %d MiB: %w", maxKernel>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

func unsupported(format string) error {
	return fmt.Errorf("the kernel is compressed with %s, which is not supported: use one compressed with zstd or gzip, or an uncompressed "+
		"vmlinux with a PVH entry: %w",
		format, errdefs.ErrNotImplemented)
}

// checkXZ looks at the first block's header before the decompressor does, which allocates whatever dictionary the
// header names (up to 4 GiB), and knows no filter beside LZMA2. Layout: xz-file-format.txt, sections 3.1 and 5.3.1.
func checkXZ(sec *io.SectionReader) error {
	const (
		streamHeader = 12
		filterLZMA2  = 0x21
		maxDictBits  = 30 // 2^(30/2+12) = 128 MiB
	)
	hdr := make([]byte, 4)
	if _, err := sec.ReadAt(hdr, streamHeader); err != nil {
		return damaged("xz", err)
	}
	body := make([]byte, (int(hdr[0])+1)*4)
	if _, err := sec.ReadAt(body, streamHeader); err != nil {
		return damaged("xz", err)
	}
	flags, rest := body[1], body[2:]
	for _, present := range []bool{flags&0x40 != 0, flags&0x80 != 0} {
		if !present {
			continue
		}
		_, n := binary.Uvarint(rest)
		if n <= 0 {
			return damaged("xz", io.ErrUnexpectedEOF)
		}
		rest = rest[n:]
	}
	if len(rest) < 3 || flags&0x3f != 0 || rest[0] != filterLZMA2 || rest[1] != 1 {
		return unsupported("xz with a filter (x86 BCJ)")
	}
	if rest[2] > maxDictBits {
		return unsupported("xz with a dictionary of more than 128 MiB")
	}
	return nil
}

func damaged(what string, err error) error {
	return fmt.Errorf("the compressed kernel is damaged (%s: %w): %w", what, err, errdefs.ErrInvalidArgument)
}

func compressionName(magic []byte) string {
	switch {
	case bytes.HasPrefix(magic, magicLZ4):
		return "lz4"
	case bytes.HasPrefix(magic, magicBzip2):
		return "bzip2"
	case bytes.HasPrefix(magic, magicLZO):
		return "lzo"
	case bytes.HasPrefix(magic, magicLZMA):
		return "lzma"
	}
	return fmt.Sprintf("an unknown format (magic % x)", magic)
}

// writeError keeps the destination's errors (disk full) apart from damage of the source.
type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

type errWriter struct{ w io.Writer }

func (e errWriter) Write(p []byte) (int, error) {
	n, err := e.w.Write(p)
	if err != nil {
		return n, &writeError{err}
	}
	return n, nil
}

// ELF-64 layout and the note by which a VMM finds the PVH entry (xen/include/public/elfnote.h).
const (
	elfHeaderSize = 64
	progHdrSize   = 56
	maxProgHdrs   = 256
	ptNote        = 4
	emX8664       = 62
	maxNotes      = 64 << 10

	noteNameXen  = "Xen\x00"
	notePhys32   = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	noteHdrSize  = 12
	noteAlignUp4 = 3
)

var errNoPVH = fmt.Errorf("it has no PVH entry note (CONFIG_PVH): %w", errdefs.ErrInvalidArgument)

// checkPVH returns nil if r is an x86-64 ELF executable with a PVH entry, and errNoPVH if only the note is missing.
func checkPVH(r io.ReaderAt, size int64) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	hdr := make([]byte, elfHeaderSize)
	if _, err := r.ReadAt(hdr, 0); err != nil {
		return bad("shorter than an ELF header")
	}
	le := binary.LittleEndian
	switch {
	case !bytes.HasPrefix(hdr, magicELF):
		return bad("no ELF magic")
	case hdr[4] != 2 || hdr[5] != 1:
		return bad("not a 64-bit little-endian ELF file")
	case le.Uint16(hdr[18:]) != emX8664:
		return bad("ELF machine %d is not x86-64", le.Uint16(hdr[18:]))
	}
	phoff, entsize, num := le.Uint64(hdr[32:]), le.Uint16(hdr[54:]), le.Uint16(hdr[56:])
	if num == 0 || num > maxProgHdrs || entsize != progHdrSize || phoff > math.MaxInt64 || int64(phoff) > size-int64(num)*progHdrSize {
		return bad("bad program headers (offset %d, %d of %d bytes)", phoff, num, entsize)
	}
	table := make([]byte, int(num)*progHdrSize)
	if _, err := r.ReadAt(table, int64(phoff)); err != nil {
		return bad("program headers: %v", err)
	}
	for ; len(table) > 0; table = table[progHdrSize:] {
		if le.Uint32(table) != ptNote {
			continue
		}
		off, filesz := le.Uint64(table[8:]), le.Uint64(table[32:])
		if filesz > maxNotes || off > math.MaxInt64 || int64(off) > size-int64(filesz) {
			return bad("bad note segment (offset %d, %d bytes)", off, filesz)
		}
		notes := make([]byte, filesz)
		if _, err := r.ReadAt(notes, int64(off)); err != nil {
			return bad("note segment: %v", err)
		}
		if hasPVHNote(notes) {
			return nil
		}
	}
	return errNoPVH
}

func hasPVHNote(notes []byte) bool {
	le := binary.LittleEndian
	for len(notes) >= noteHdrSize {
		namesz, descsz, typ := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		notes = notes[noteHdrSize:]
		nameEnd := (namesz + noteAlignUp4) &^ noteAlignUp4
		descEnd := nameEnd + (descsz+noteAlignUp4)&^noteAlignUp4
		if nameEnd > uint64(len(notes)) || nameEnd+descsz > uint64(len(notes)) {
			return false
		}
		if typ == notePhys32 && string(notes[:namesz]) == noteNameXen && (descsz == 4 || descsz == 8) {
			return true
		}
		notes = notes[min(descEnd, uint64(len(notes))):]
	}
	return false
}
