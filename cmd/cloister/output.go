// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkOutput looks before the work; writeOutput makes sure.
func checkOutput(path string, force bool) error {
	if _, err := os.Lstat(path); err == nil && !force {
		return fmt.Errorf("%s is there already; give another --output, or --force to replace it", path)
	}
	return nil
}

// writeOutput makes the file, readable by this user alone, appear as a whole or not at all. Until its content stands the
// file has no name, so that a process that is killed leaves nothing of a secret; a file system that knows no such files
// (O_TMPFILE) has it under a hidden name meanwhile.
func writeOutput(ctx context.Context, path string, force bool, content io.WriterTo) error {
	f, err := unnamedFile(filepath.Dir(path))
	if errors.Is(err, errors.ErrUnsupported) {
		return writeNamed(ctx, path, force, content)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(ctx, f, content); err != nil {
		return err
	}
	// A link does not replace what came in the meantime.
	if err := nameFile(f, path); !force || !errors.Is(err, os.ErrExist) {
		return err
	}
	// Only a rename replaces. Nothing stands between the two calls but a kill at this very moment.
	tmp := hidden(path) + rand.Text()
	if err := nameFile(f, tmp); err != nil {
		return err
	}
	return replace(tmp, path)
}

// unnamedFile is a file in a directory without a name: open(2), O_TMPFILE. errors.ErrUnsupported: the file system has none.
func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "make a file in", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// nameFile gives a file a name, os.ErrExist if it is taken; by the file's link in /proc, as open(2) shows for users without
// privileges.
func nameFile(f *os.File, path string) error {
	old := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, old, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: old, New: path, Err: err}
	}
	return nil
}

func hidden(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".")
}

// replace renames tmp, which does not stay.
func replace(tmp, path string) error {
	err := os.Rename(tmp, path)
	if err != nil {
		err = errors.Join(err, os.Remove(tmp))
	}
	return err
}

func fill(ctx context.Context, f *os.File, content io.WriterTo) error {
	_, err := content.WriteTo(f)
	return errors.Join(err, f.Sync(), ctx.Err())
}

// writeNamed is writeOutput with a hidden name.
func writeNamed(ctx context.Context, path string, force bool, content io.WriterTo) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(hidden(path))+"*")
	if err != nil {
		return err
	}
	if err := errors.Join(fill(ctx, f, content), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if force {
		return replace(f.Name(), path)
	}
	return errors.Join(os.Link(f.Name(), path), os.Remove(f.Name()))
}
