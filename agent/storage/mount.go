// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// option of a file system, as fsconfig(2) takes it: a flag if Value is empty.
type option struct{ Key, Value string }

func (o option) String() string {
	if o.Value == "" {
		return o.Key
	}
	return o.Key + "=" + o.Value
}

// MountError says what was tried and what the kernel said to it.
type MountError struct {
	Type, Target string
	Options      []option
	// Kernel holds the file system's own words, if it said any.
	Kernel string
	Err    error
}

// Error implements error.
func (e *MountError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "mount %s at %s", e.Type, e.Target)
	const most = 8 // of up to 500 layers
	for i, o := range e.Options {
		if i == most {
			fmt.Fprintf(&b, ", and %d more options", len(e.Options)-most)
			break
		}
		sep := ", "
		if i == 0 {
			sep = " with "
		}
		b.WriteString(sep + o.String())
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	if e.Kernel != "" {
		fmt.Fprintf(&b, " (%s)", e.Kernel)
	}
	return b.String()
}

// Unwrap returns the kernel's error number.
func (e *MountError) Unwrap() error { return e.Err }

// mountFS mounts a new file system at target with private propagation. It uses the newer system calls since mount(2)
// takes one page of options only, too little for many layers.
func mountFS(fstype, target string, attrs int, options ...option) (err error) {
	var messages string
	defer func() {
		if err != nil {
			err = &MountError{Type: fstype, Target: target, Options: options, Kernel: messages, Err: err}
		}
	}()
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs)
	for _, o := range options {
		if o.Value == "" {
			err = unix.FsconfigSetFlag(fs, o.Key)
		} else {
			err = unix.FsconfigSetString(fs, o.Key, o.Value)
		}
		if err != nil {
			messages = kernelMessages(fs)
			return fmt.Errorf("option %s: %w", o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		messages = kernelMessages(fs)
		return err
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		messages = kernelMessages(fs)
		return err
	}
	defer unix.Close(mnt)
	return attach(mnt, target)
}

// attach puts a detached mount at target and makes it private.
func attach(mnt int, target string) error {
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	// It became shared by its place.
	if err := unix.MountSetattr(mnt, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return errors.Join(fmt.Errorf("make it private: %w", err), unmount(target, 0))
	}
	return nil
}

// kernelMessages reads what a file system had to say about its options.
func kernelMessages(fs int) string {
	const most = 8
	var out []string
	buf := make([]byte, 512)
	for len(out) < most {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		out = append(out, strings.TrimSpace(string(buf[:n])))
	}
	return strings.Join(out, "; ")
}

// unmount takes the topmost mount from path, with those in it if the flags have MNT_DETACH. It is no error if there is none.
func unmount(path string, flags int) error {
	err := unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW)
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("unmount %s: %w", path, err)
}
