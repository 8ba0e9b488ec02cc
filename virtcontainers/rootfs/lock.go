// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// errLocked says that somebody else holds a lock.
var errLocked = errors.New("locked by another")

// flock locks an open file. Without unix.LOCK_NB in how it waits, however long.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return errLocked
		}
		return err
	}
}

// lockFile makes a lock file and locks it exclusively. Lock files are removed with what they guard, by their holder, so the file
// that is locked in the end must still be the one at path.
func lockFile(path string, how int) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(f, how); err != nil {
			f.Close()
			return nil, err
		}
		same, err := isFileAt(f, path)
		if same && err == nil {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
}

// isFileAt reports whether path leads to the open file.
func isFileAt(f *os.File, path string) (bool, error) {
	open, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Lstat(path)
	if os.IsNotExist(err) {
		return false, nil
	}
	return err == nil && os.SameFile(open, there), err
}
