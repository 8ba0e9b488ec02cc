// SPDX-License-Identifier: Apache-2.0

package pvh

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	lockName      = "lock"
	memoPrefix    = "memo-"
	kernelPrefix  = "vmlinux-"
	scratchPrefix = ".new-"

	memoVersion = 1
	maxMemo     = 4 << 10
	// keepKernels bounds the cache; a kernel is about 60 MiB.
	keepKernels = 4
	keepMemos   = 64
)

// Extract returns the path of the kernel to boot for the bzImage at that path: the vmlinux taken out of it, kept in
// cacheDir (made if missing), or the given path itself if it is a vmlinux already or its kernel has no PVH entry.
//
// errdefs.ErrInvalidArgument: the file is no kernel, or is damaged. errdefs.ErrNotImplemented: a compression that is
// not supported. os.ErrNotExist: no such file. The caller uses the result soon: an extraction of many other kernels
// may remove it.
func Extract(ctx context.Context, bzImage, cacheDir string) (string, error) {
	if err := os.MkdirAll(cacheDir, 0o700); err != nil {
		return "", fmt.Errorf("kernel cache: %w", err)
	}
	src, size, err := openRegular(bzImage)
	if err != nil {
		return "", err
	}
	defer src.Close()
	kind, err := inspect(src, size, bzImage)
	if err != nil {
		return "", err
	}
	if kind == Vmlinux {
		return bzImage, nil
	}
	id, err := identify(src)
	if err != nil {
		return "", fmt.Errorf("kernel %s: %w", bzImage, err)
	}
	c := cache{dir: cacheDir}
	if path, ok := c.lookup(id, bzImage); ok {
		return path, nil
	}

	unlock, err := c.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	// Somebody else may have done it while this call waited for the lock.
	if path, ok := c.lookup(id, bzImage); ok {
		return path, nil
	}
	path, err := c.extract(ctx, src, id, bzImage)
	if err != nil {
		return "", fmt.Errorf("take the kernel out of %s: %w", bzImage, err)
	}
	return path, nil
}

// identity of a file's content as far as it shows without reading it. The change time is part of it because mtime can
// be set back.
type identity struct {
	Dev   uint64 `json:"dev"`
	Ino   uint64 `json:"ino"`
	Size  int64  `json:"size"`
	Mtime int64  `json:"mtime_ns"`
	Ctime int64  `json:"ctime_ns"`
}

func identify(f *os.File) (identity, error) {
	fi, err := f.Stat()
	if err != nil {
		return identity{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return identity{}, fmt.Errorf("stat: %w", errdefs.ErrNotImplemented)
	}
	return identity{Dev: st.Dev, Ino: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}, nil
}

// memo is what is known of one bzImage.
type memo struct {
	Version int      `json:"version"`
	File    identity `json:"file"`
	SHA256  string   `json:"sha256"`
	// PVH is false where the image's kernel has no PVH entry: then the bzImage itself is booted.
	PVH bool `json:"pvh"`
}

type cache struct{ dir string }

func (c cache) memoPath(id identity) string {
	return filepath.Join(c.dir, fmt.Sprintf("%s%x-%x", memoPrefix, id.Dev, id.Ino))
}

func (c cache) kernelPath(sum string) string { return filepath.Join(c.dir, kernelPrefix+sum) }

// lookup finds what an earlier call left. Anything odd counts as not found: it is made anew.
func (c cache) lookup(id identity, bzImage string) (string, bool) {
	m, ok := c.readMemo(id)
	if !ok {
		return "", false
	}
	if !m.PVH {
		return bzImage, true
	}
	return c.kernel(m.SHA256)
}

func (c cache) readMemo(id identity) (memo, bool) {
	var m memo
	f, err := os.Open(c.memoPath(id))
	if err != nil {
		return m, false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMemo))
	if err != nil || json.Unmarshal(b, &m) != nil || m.Version != memoVersion || m.File != id {
		return m, false
	}
	if sum, err := hex.DecodeString(m.SHA256); err != nil || len(sum) != sha256.Size {
		return m, false
	}
	return m, true
}

// kernel returns the cached kernel if it is there and whole, and marks it as used.
func (c cache) kernel(sum string) (string, bool) {
	path := c.kernelPath(sum)
	f, size, err := openRegular(path)
	if err != nil {
		return "", false
	}
	defer f.Close()
	if checkPVH(f, size) != nil {
		return "", false
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // for prune only
	return path, true
}

// lock waits for the directory's lock. flock(2) cannot be interrupted, so the wait is in a goroutine of its own; when ctx
// ends first, it lets go of the lock as soon as it gets it.
func (c cache) lock(ctx context.Context) (func(), error) {
	f, err := os.OpenFile(filepath.Join(c.dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("kernel cache: %w", err)
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if !errors.Is(err, unix.EINTR) {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock kernel cache %s: %w", c.dir, err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		go func() {
			<-got
			f.Close()
		}()
		return nil, fmt.Errorf("wait for another process that unpacks a kernel into %s: %w", c.dir, ctx.Err())
	}
}

// extract fills the cache. The lock is held.
func (c cache) extract(ctx context.Context, src *os.File, id identity, bzImage string) (string, error) {
	start := time.Now()
	c.removeScratch()
	h := sha256.New()
	if _, err := io.Copy(h, ctxReader{ctx, io.NewSectionReader(src, 0, id.Size)}); err != nil {
		return "", fmt.Errorf("hash: %w", err)
	}
	m := memo{Version: memoVersion, File: id, SHA256: hex.EncodeToString(h.Sum(nil))}

	path, ok := c.kernel(m.SHA256) // the same kernel under another name
	if !ok {
		var err error
		if path, err = c.unpack(ctx, src, id, m.SHA256); err != nil {
			return "", err
		}
	}
	if now, err := identify(src); err != nil || now != id {
		return "", fmt.Errorf("the file changed while it was read, try again: %w", errdefs.ErrUnavailable)
	}
	m.PVH = path != ""
	if err := c.writeMemo(m); err != nil {
		// Only the next start is slower.
		log.G(ctx).WithError(err).Warn("cannot note the kernel in the cache")
	}
	c.prune(m.SHA256)
	// The decompressor's window is tens of MiB, and the process may be a small shim.
	debug.FreeOSMemory()
	log.G(ctx).WithField("kernel", bzImage).WithField("pvh", m.PVH).WithField("took", time.Since(start)).
		Info("took the kernel out of its image")
	if !m.PVH {
		return bzImage, nil
	}
	return path, nil
}

// unpack writes the kernel to the cache. The path is empty if the kernel has no PVH entry.
func (c cache) unpack(ctx context.Context, src *os.File, id identity, sum string) (string, error) {
	sec, ok, err := payload(src, id.Size)
	if err != nil || !ok {
		return "", err
	}
	tmp, err := os.CreateTemp(c.dir, scratchPrefix)
	if err != nil {
		return "", err
	}
	defer func() {
		tmp.Close()
		os.Remove(tmp.Name()) // fails once renamed
	}()
	if err := decompress(errWriter{ctxWriter{ctx, tmp}}, sec); err != nil {
		return "", err
	}
	fi, err := tmp.Stat()
	if err != nil {
		return "", err
	}
	switch err := checkPVH(tmp, fi.Size()); {
	case errors.Is(err, errNoPVH):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("the kernel in the image: %w", err)
	}
	path := c.kernelPath(sum)
	if err := commit(tmp, path); err != nil {
		return "", err
	}
	return path, nil
}

func (c cache) writeMemo(m memo) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(c.dir, scratchPrefix)
	if err != nil {
		return err
	}
	defer func() {
		tmp.Close()
		os.Remove(tmp.Name())
	}()
	if _, err := tmp.Write(b); err != nil {
		return err
	}
	return commit(tmp, c.memoPath(m.File))
}

// commit makes a finished scratch file appear under its name.
func commit(tmp *os.File, path string) error {
	if err := tmp.Chmod(0o400); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func (c cache) removeScratch() {
	entries, _ := os.ReadDir(c.dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), scratchPrefix) {
			os.Remove(filepath.Join(c.dir, e.Name()))
		}
	}
}

// prune removes the kernels used longest ago, and old notes.
func (c cache) prune(keep string) {
	c.pruneTo(kernelPrefix, keepKernels, kernelPrefix+keep)
	c.pruneTo(memoPrefix, keepMemos, "")
}

func (c cache) pruneTo(prefix string, count int, keep string) {
	entries, _ := os.ReadDir(c.dir)
	type aged struct {
		name string
		used time.Time
	}
	var files []aged
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && strings.HasPrefix(e.Name(), prefix) {
			files = append(files, aged{e.Name(), fi.ModTime()})
		}
	}
	if len(files) <= count {
		return
	}
	slices.SortFunc(files, func(a, b aged) int { return b.used.Compare(a.used) })
	for _, k := range files[count:] {
		if k.name != keep {
			os.Remove(filepath.Join(c.dir, k.name))
		}
	}
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

type ctxWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c ctxWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(p)
}
