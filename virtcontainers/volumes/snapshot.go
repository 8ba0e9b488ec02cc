// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// File of a snapshot.
type File struct {
	// Path below the volume; its elements do not start with "..".
	Path string
	// Mode has permission bits only.
	Mode, UID, GID uint32
	Content        []byte
}

// Snapshot is what a volume held at one time.
type Snapshot struct {
	// Version names the kubelet's update; empty for a directory that the kubelet's AtomicWriter did not write.
	Version string
	// Files in the order of their paths.
	Files []File
}

const (
	dataLink = "..data"
	// maxAttempts bounds how often a snapshot begins anew because the kubelet changed the volume.
	maxAttempts = 10
	maxDepth    = 16
)

// errChanged tells that a volume changed while it was read.
var errChanged = errors.New("the volume changed while it was read")

// Read takes a snapshot of the volume, or of any directory. errdefs.ErrInvalidArgument: it holds something else than files
// and directories. errdefs.ErrResourceExhausted: it breaks a limit of package wire. errdefs.ErrUnavailable: it changes faster
// than it can be read.
func Read(ctx context.Context, dir string) (*Snapshot, error) {
	return read(ctx, dir, nil)
}

// read is Read with a function that is called after each file, for tests.
func read(ctx context.Context, dir string, step func()) (*Snapshot, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", dir, err)
	}
	defer unix.Close(root)
	for range maxAttempts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s, err := readOnce(root, step)
		if err == nil {
			return s, nil
		}
		if !errors.Is(err, errChanged) {
			return nil, fmt.Errorf("volume %s: %w", dir, err)
		}
	}
	return nil, fmt.Errorf("volume %s changed %d times while it was read: %w", dir, maxAttempts, errdefs.ErrUnavailable)
}

func readOnce(root int, step func()) (*Snapshot, error) {
	version, err := readVersion(root)
	if err != nil {
		return nil, err
	}
	w := walker{step: step, unwritten: version == ""}
	top := "."
	if version != "" {
		top = version
	}
	if err = w.directory(root, top, "", 0); err == nil {
		var after string
		if after, err = readVersion(root); err == nil && after != version {
			err = errChanged
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		// The kubelet removes the old files after an update.
		return nil, errChanged
	case err != nil:
		return nil, err
	}
	slices.SortFunc(w.files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return &Snapshot{Version: version, Files: w.files}, nil
}

// readVersion reads the ..data link; "" without one.
func readVersion(root int) (string, error) {
	buf := make([]byte, 256)
	n, err := unix.Readlinkat(root, dataLink, buf)
	switch {
	case errors.Is(err, unix.ENOENT):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("%s: %w", dataLink, err)
	}
	target := string(buf[:n])
	if n == len(buf) || strings.Contains(target, "/") || target == ".." || !strings.HasPrefix(target, "..") {
		return "", fmt.Errorf("%s leads to %.64q, which is no directory of the volume: %w", dataLink, target, errdefs.ErrInvalidArgument)
	}
	return target, nil
}

type walker struct {
	files []File
	// entries counts directories too, bytes the contents.
	entries int
	bytes   int64
	// unwritten: there is no ..data (yet), so that the AtomicWriter's own names are among the files.
	unwritten bool
	step      func()
}

// beneath opens what nothing leads away from: no link, no mount, no "..".
func beneath(dir int, name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(dir, name, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		return fd, err
	}
}

// directory gathers the files of one directory. name is relative to dir, path what the guest calls it.
func (w *walker) directory(dir int, name, path string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d directories deep: %w", path, maxDepth, errdefs.ErrResourceExhausted)
	}
	fd, err := beneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%s: %w", orRoot(path), err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	for {
		// In small parts: a directory with a million names shall not be read whole to find that out.
		entries, err := f.ReadDir(64)
		for _, e := range entries {
			if err := w.entry(fd, e.Name(), filepath.Join(path, e.Name()), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", orRoot(path), err)
		}
	}
}

func orRoot(path string) string {
	if path == "" {
		return "its directory"
	}
	return path
}

func (w *walker) entry(dir int, name, path string, depth int) error {
	if w.unwritten && depth == 0 && strings.HasPrefix(name, "..") {
		return nil
	}
	w.entries++
	switch {
	case w.entries > wire.MaxVolumeFiles:
		return fmt.Errorf("more than %d files: %w", wire.MaxVolumeFiles, errdefs.ErrResourceExhausted)
	case len(path) > wire.MaxVolumePath:
		return fmt.Errorf("the path %.64s... has %d bytes, the limit is %d: %w", path, len(path), wire.MaxVolumePath,
			errdefs.ErrResourceExhausted)
	case strings.HasPrefix(name, ".."):
		return fmt.Errorf("%s: the name starts with two dots: %w", path, errdefs.ErrInvalidArgument)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return w.directory(dir, name, path, depth+1)
	case unix.S_IFREG:
		return w.file(dir, name, path)
	}
	return fmt.Errorf("%s is neither a file nor a directory: %w", path, errdefs.ErrInvalidArgument)
}

func (w *walker) file(dir int, name, path string) error {
	fd, err := beneath(dir, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errChanged // it was one a moment ago
	}
	left := wire.MaxVolumeBytes - w.bytes
	tooBig := fmt.Errorf("%s: the files have more than %d bytes: %w", path, wire.MaxVolumeBytes, errdefs.ErrResourceExhausted)
	if st.Size > left {
		return tooBig
	}
	content, err := io.ReadAll(io.LimitReader(f, left+1))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if int64(len(content)) > left {
		return tooBig
	}
	w.bytes += int64(len(content))
	w.files = append(w.files, File{Path: path, Mode: st.Mode & 0o777, UID: st.Uid, GID: st.Gid, Content: content})
	if w.step != nil {
		w.step()
	}
	return nil
}
