// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ReadFile reads a regular file of at most max bytes. digest is its SHA-256 in lower-case hexadecimal digits.
// errdefs.ErrInvalidArgument: it is none, or longer. os.ErrNotExist as usual.
func ReadFile(path string, max int64) (content []byte, digest string, err error) {
	var b bytes.Buffer
	sum, err := digestFile(path, max, &b, nil)
	return b.Bytes(), sum, err
}

// ReadKeyFile is ReadFile for a file with a secret key. A file that is open to all users, for whatever, is refused with
// errdefs.ErrInvalidArgument; the file that is looked at is the one that is read. Errors never have a part of the content.
func ReadKeyFile(path string, max int64) ([]byte, error) {
	var b bytes.Buffer
	_, err := digestFile(path, max, &b, func(mode os.FileMode) error {
		if mode.Perm()&0o007 == 0 {
			return nil
		}
		return fmt.Errorf("the key %s is open to all users (mode %04o); chmod 600 it, and take another key if somebody else had access: %w",
			path, mode.Perm(), errdefs.ErrInvalidArgument)
	})
	if err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// DigestFile is ReadFile without the content, for large files.
func DigestFile(path string, max int64) (digest string, err error) {
	return digestFile(path, max, io.Discard, nil)
}

// digestFile has accept, unless it is nil, look at the open file before anything is read.
func digestFile(path string, max int64, to io.Writer, accept func(os.FileMode) error) (string, error) {
	// A fifo would block the open, a device may give bytes for ever.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case !fi.Mode().IsRegular():
		return "", fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrInvalidArgument)
	case fi.Size() > max:
		return "", fmt.Errorf("%s has %d bytes, more than the %d that are accepted: %w", path, fi.Size(), max, errdefs.ErrInvalidArgument)
	}
	if accept != nil {
		if err := accept(fi.Mode()); err != nil {
			return "", err
		}
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(h, to), io.LimitReader(f, max+1))
	switch {
	case err != nil:
		return "", err
	case n != fi.Size():
		return "", fmt.Errorf("%s changed while it was read: %w", path, errdefs.ErrUnavailable)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
