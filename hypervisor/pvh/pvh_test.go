// SPDX-License-Identifier: Apache-2.0

package pvh

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// testELF is a minimal x86-64 ELF file with one note segment.
func testELF(noteType uint32) []byte {
	b := make([]byte, elfHeaderSize+progHdrSize)
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[18:], emX8664)
	le.PutUint64(b[32:], elfHeaderSize)
	le.PutUint16(b[54:], progHdrSize)
	le.PutUint16(b[56:], 1)
	ph := b[elfHeaderSize:]
	le.PutUint32(ph, ptNote)
	le.PutUint64(ph[8:], uint64(len(b)))
	note := []byte{3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 'G', 'N', 'U', 0, 9, 9, 0, 0} // another note before ours
	note = le.AppendUint32(note, 4)
	note = le.AppendUint32(note, 8)
	note = le.AppendUint32(note, noteType)
	note = append(note, noteNameXen...)
	note = le.AppendUint64(note, 0x1000000)
	le.PutUint64(ph[32:], uint64(len(note)))
	return append(b, note...)
}

func testBzImage(payload []byte) []byte {
	b := make([]byte, 2*sectorSize+0x100)
	le := binary.LittleEndian
	b[offSetupSects] = 1
	le.PutUint16(b[offBootFlag:], 0xaa55)
	copy(b[offHdrS:], "HdrS")
	le.PutUint16(b[offVersion:], 0x020f)
	le.PutUint32(b[offPayloadOffset:], 0x100)
	le.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	return append(append(b, payload...), "trailing bytes"...)
}

func withSize(compressed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(compressed, uint32(size))
}

func compress(t testing.TB, format string, b []byte) []byte {
	var buf bytes.Buffer
	var w io.WriteCloser
	var err error
	switch format {
	case "zstd":
		w, err = zstd.NewWriter(&buf)
	case "gzip":
		w = gzip.NewWriter(&buf)
	case "xz":
		w, err = xz.NewWriter(&buf)
	case "lz4":
		return withSize(append(bytes.Clone(magicLZ4), b...), len(b))
	case "none":
		return withSize(bytes.Clone(b), len(b))
	}
	require.NoError(t, err)
	_, err = w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	if format == "gzip" {
		return buf.Bytes()
	}
	return withSize(buf.Bytes(), len(b))
}

func writeFile(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmlinuz")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	return path
}

func TestExtractFormats(t *testing.T) {
	for _, format := range []string{"zstd", "gzip", "xz", "none"} {
		t.Run(format, func(t *testing.T) {
			elf := testELF(notePhys32)
			image, dir := writeFile(t, testBzImage(compress(t, format, elf))), filepath.Join(t.TempDir(), "cache")
			path, err := Extract(context.Background(), image, dir)
			require.NoError(t, err)
			got, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, elf, got)

			again, err := Extract(context.Background(), image, dir)
			require.NoError(t, err)
			require.Equal(t, path, again)
			kind, err := Inspect(path)
			require.NoError(t, err)
			require.Equal(t, Vmlinux, kind)
			noScratch(t, dir)
		})
	}
}

func noScratch(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, scratchPrefix+"*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestExtractGivesTheFileItself(t *testing.T) {
	dir := t.TempDir()
	vmlinux := writeFile(t, testELF(notePhys32))
	path, err := Extract(context.Background(), vmlinux, dir)
	require.NoError(t, err)
	require.Equal(t, vmlinux, path)

	noPVH := writeFile(t, testBzImage(compress(t, "zstd", testELF(17))))
	for range 2 { // the second time from the memo
		path, err = Extract(context.Background(), noPVH, dir)
		require.NoError(t, err)
		require.Equal(t, noPVH, path)
	}
	old := testBzImage(compress(t, "zstd", testELF(notePhys32)))
	binary.LittleEndian.PutUint16(old[offVersion:], 0x0207)
	image := writeFile(t, old)
	path, err = Extract(context.Background(), image, dir)
	require.NoError(t, err)
	require.Equal(t, image, path)
}

func TestExtractRefuses(t *testing.T) {
	good := testBzImage(compress(t, "zstd", testELF(notePhys32)))
	corrupt := bytes.Clone(good)
	for i := 2*sectorSize + 0x100 + 5; i < 2*sectorSize+0x100+20; i++ {
		corrupt[i] ^= 0xff
	}
	notELF := testBzImage(compress(t, "zstd", []byte("this is not a kernel, but it is long enough to be an ELF header if it wanted to")))
	arm := testELF(notePhys32)
	arm[18] = 183
	for _, tc := range []struct {
		name  string
		image []byte
		kind  error
		says  string
	}{
		{"empty", nil, errdefs.ErrInvalidArgument, "not a kernel"},
		{"text", []byte(strings.Repeat("hello world\n", 100)), errdefs.ErrInvalidArgument, "neither a bzImage"},
		{"truncated", good[:len(good)-60], errdefs.ErrInvalidArgument, "truncated"},
		{"corrupt", corrupt, errdefs.ErrInvalidArgument, "damaged"},
		{"lz4", testBzImage(compress(t, "lz4", testELF(notePhys32))), errdefs.ErrNotImplemented, "lz4"},
		{"not ELF inside", notELF, errdefs.ErrInvalidArgument, "no ELF magic"},
		{"ELF without PVH", testELF(17), errdefs.ErrInvalidArgument, "CONFIG_PVH"},
		{"ELF of another machine", arm, errdefs.ErrInvalidArgument, "not x86-64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			image := writeFile(t, tc.image)
			_, err := Extract(context.Background(), image, dir)
			require.ErrorIs(t, err, tc.kind)
			require.ErrorContains(t, err, tc.says)
			require.ErrorContains(t, err, image)
			noScratch(t, dir)
		})
	}
	_, err := Extract(context.Background(), "/nonexistent/vmlinuz", t.TempDir())
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Extract(context.Background(), t.TempDir(), t.TempDir())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestExtractChangedAndDamagedCache(t *testing.T) {
	dir := t.TempDir()
	image := writeFile(t, testBzImage(compress(t, "zstd", testELF(notePhys32))))
	first, err := Extract(context.Background(), image, dir)
	require.NoError(t, err)

	// A cached kernel that is cut off, as after a crash of the machine, is made anew.
	require.NoError(t, os.Truncate(first, 10))
	again, err := Extract(context.Background(), image, dir)
	require.NoError(t, err)
	require.Equal(t, first, again)
	require.NoError(t, func() error { _, err := Inspect(again); return err }())

	// So is a memo that says nothing useful.
	memos, err := filepath.Glob(filepath.Join(dir, memoPrefix+"*"))
	require.NoError(t, err)
	require.Len(t, memos, 1)
	require.NoError(t, os.Remove(memos[0]))
	require.NoError(t, os.WriteFile(memos[0], []byte(`{"version":1,"pvh":true,"sha256":"../../etc"}`), 0o600))
	_, err = Extract(context.Background(), image, dir)
	require.NoError(t, err)

	// New content under the same name is seen, and rubbish of a killed process goes.
	require.NoError(t, os.WriteFile(filepath.Join(dir, scratchPrefix+"123"), []byte("x"), 0o600))
	other := append(testELF(notePhys32), "other"...)
	require.NoError(t, os.WriteFile(image, testBzImage(compress(t, "gzip", other)), 0o600))
	second, err := Extract(context.Background(), image, dir)
	require.NoError(t, err)
	require.NotEqual(t, first, second)
	noScratch(t, dir)
}

func TestExtractPrunes(t *testing.T) {
	dir := t.TempDir()
	for i := range keepKernels + 3 {
		elf := append(testELF(notePhys32), byte(i))
		path, err := Extract(context.Background(), writeFile(t, testBzImage(compress(t, "none", elf))), dir)
		require.NoError(t, err)
		require.FileExists(t, path)
	}
	left, err := filepath.Glob(filepath.Join(dir, kernelPrefix+"*"))
	require.NoError(t, err)
	require.Len(t, left, keepKernels)
}

func TestExtractConcurrent(t *testing.T) {
	dir := t.TempDir()
	image := writeFile(t, testBzImage(compress(t, "zstd", testELF(notePhys32))))
	var wg sync.WaitGroup
	errs := make(chan error, 16)
	for range cap(errs) {
		wg.Go(func() {
			path, err := Extract(context.Background(), image, dir)
			if err == nil {
				_, err = Inspect(path)
			}
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	noScratch(t, dir)
}

func TestExtractCancelledWhileLocked(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, lockName))
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = Extract(ctx, writeFile(t, testBzImage(compress(t, "none", testELF(notePhys32)))), dir)
	require.ErrorIs(t, err, context.Canceled)
}

func TestDecompressBounds(t *testing.T) {
	// 513 MiB of zeros in a few KiB.
	var buf bytes.Buffer
	z, err := zstd.NewWriter(&buf, zstd.WithWindowSize(1<<20))
	require.NoError(t, err)
	zero := make([]byte, 1<<20)
	for range maxKernel>>20 + 1 {
		_, err := z.Write(zero)
		require.NoError(t, err)
	}
	require.NoError(t, z.Close())
	b := withSize(buf.Bytes(), 0)
	err = decompress(io.Discard, io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))))
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)

	full := errors.New("disk full")
	elf := compress(t, "zstd", testELF(notePhys32))
	err = decompress(errWriter{writerFunc(func([]byte) (int, error) { return 0, full })},
		io.NewSectionReader(bytes.NewReader(elf), 0, int64(len(elf))))
	require.ErrorIs(t, err, full)
	require.False(t, errdefs.IsInvalidArgument(err), fmt.Sprint(err))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func FuzzKernel(f *testing.F) {
	f.Add(testELF(notePhys32))
	f.Add(testELF(17))
	for _, format := range []string{"zstd", "gzip", "xz", "lz4", "none"} {
		f.Add(testBzImage(compress(f, format, testELF(notePhys32))))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, size := bytes.NewReader(b), int64(len(b))
		kind, err := inspect(r, size, "fuzz")
		if err != nil || kind == Vmlinux {
			return
		}
		sec, ok, err := payload(r, size)
		if err != nil || !ok {
			return
		}
		var out limitedBuffer
		if err := decompress(errWriter{&out}, sec); err == nil {
			_ = checkPVH(bytes.NewReader(out.b), int64(len(out.b)))
		}
	})
}

// limitedBuffer keeps a fuzzing round short.
type limitedBuffer struct{ b []byte }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if len(l.b)+len(p) > 1<<20 {
		return 0, io.ErrShortWrite
	}
	l.b = append(l.b, p...)
	return len(p), nil
}

// TestExtractRealKernel needs CLOISTER_TEST_KERNEL, the path of a bzImage.
func TestExtractRealKernel(t *testing.T) {
	image := os.Getenv("CLOISTER_TEST_KERNEL")
	if image == "" {
		t.Skip("CLOISTER_TEST_KERNEL (path of a bzImage) is not set")
	}
	dir := t.TempDir()
	path, err := Extract(context.Background(), image, dir)
	require.NoError(t, err)
	require.NotEqual(t, image, path)
	fi, err := os.Stat(path)
	require.NoError(t, err)
	t.Logf("%s: %d bytes", path, fi.Size())
}

func BenchmarkExtractCached(b *testing.B) {
	dir := b.TempDir()
	image := writeFile(b, testBzImage(compress(b, "zstd", testELF(notePhys32))))
	for b.Loop() {
		if _, err := Extract(context.Background(), image, dir); err != nil {
			b.Fatal(err)
		}
	}
}
