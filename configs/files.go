// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// openNonblock keeps an open of a FIFO from waiting for its other end.
const openNonblock = unix.O_NONBLOCK | unix.O_CLOEXEC

// CheckFile checks that the file at path, which a key names, is a regular file that can be read and is not empty. It
// returns the fault, with what to do; nil if there is none.
func (c *Config) CheckFile(key, path, fix string) Faults {
	if err := checkReadable(path); err != nil {
		return Faults{c.Fault(key, fmt.Sprintf("%s: %s", path, reasonOf(err)), fix)}
	}
	return nil
}

// VirtiofsdPath is the absolute path of virtiofsd: hypervisor.virtiofsd, or where that is empty, what is found. The
// error is of type Faults. Only pods with live host directories need it.
func (c *Config) VirtiofsdPath() (string, error) {
	return c.binary("hypervisor.virtiofsd", c.Hypervisor.Virtiofsd, "virtiofsd", []string{"/usr/libexec", "/usr/lib/qemu", "/usr/local/bin"},
		"install virtiofsd (Debian 13: virtiofsd; Debian 12: qemu-system-common, without supplementary groups) or set the key")
}

func (c *Config) binary(key, path, name string, places []string, fix string) (string, error) {
	if path != "" {
		if err := checkExecutable(path); err != nil {
			return "", Faults{c.Fault(key, fmt.Sprintf("%s: %s", path, reasonOf(err)), fix)}
		}
		return path, nil
	}
	// exec.LookPath refuses what it found relative to the working directory; the shim's is the bundle.
	if found, err := exec.LookPath(name); err == nil && filepath.IsAbs(found) {
		return found, nil
	}
	for _, dir := range places {
		if p := filepath.Join(dir, name); checkExecutable(p) == nil {
			return p, nil
		}
	}
	return "", Faults{c.Fault(key, fmt.Sprintf("%s was not found in PATH, %s", name, strings.Join(places, ", ")), fix)}
}

func checkReadable(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return errors.New("is not a regular file")
	}
	if st.Size() == 0 {
		return errors.New("is empty")
	}
	return nil
}

func checkExecutable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return errors.New("is not a regular file")
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return &fs.PathError{Op: "access", Path: path, Err: err}
	}
	return nil
}
