// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// openNonblock keeps an open of a FIFO from waiting for its other end.
const openNonblock = unix.O_NONBLOCK | unix.O_CLOEXEC

// CheckFiles looks at the files that every pod needs: the kernel and the initrd, or the sealed image that holds both; what
// the platform reads; and the VMM. Each must be a regular file that can be read (and executed, for the VMM). The error is
// of type Faults and names all that are missing, each with its key and what to do.
func (c *Config) CheckFiles() error {
	faults := slices.Concat(c.checkBootFiles(), c.checkTEEFiles())
	if _, err := c.QEMU(); err != nil {
		var fs Faults
		if errors.As(err, &fs) {
			faults = append(faults, fs...)
		}
	}
	return faults.err()
}

func (c *Config) checkBootFiles() Faults {
	type bootFile struct{ key, path, fix string }
	build := "build it with `make guest` or set the key"
	if c.Architecture() == ArchS390X {
		build = "build it with `make guest-s390x` or set the key"
	}
	files := []bootFile{{"hypervisor.kernel", c.Hypervisor.Kernel, build}, {"hypervisor.initrd", c.Hypervisor.Initrd, build}}
	if image := c.SealedImage(); image != "" {
		files = []bootFile{{"tee.se.image", image, "build it with `cloister image se build` or correct the key"}}
	}
	var faults Faults
	for _, f := range files {
		if err := checkReadable(f.path); err != nil {
			faults = append(faults, c.fault(f.key, fmt.Sprintf("%s: %s", f.path, reasonOf(err)), f.fix))
		}
	}
	return faults
}

// QEMU is the absolute path of the VMM's binary: hypervisor.path, or where that is empty, what is found. The error is
// of type Faults.
func (c *Config) QEMU() (string, error) {
	arch := c.Architecture()
	fix := "install QEMU 7.2 or later (Debian: qemu-system-x86 from backports) or set the key"
	if arch == ArchS390X {
		fix = "install QEMU for s390x (Debian 12: qemu-system-misc, later ones: qemu-system-s390x) or set the key"
	}
	return c.binary("hypervisor.path", c.Hypervisor.Path, "qemu-system-"+qemuArch(arch), []string{"/usr/bin", "/usr/local/bin", "/usr/libexec"}, fix)
}

// VirtiofsdPath is the absolute path of virtiofsd: hypervisor.virtiofsd, or where that is empty, what is found. The
// error is of type Faults. Only pods with live host folders need it, so CheckFiles does not look.
func (c *Config) VirtiofsdPath() (string, error) {
	return c.binary("hypervisor.virtiofsd", c.Hypervisor.Virtiofsd, "virtiofsd", []string{"/usr/libexec", "/usr/lib/qemu", "/usr/local/bin"},
		"install virtiofsd (Debian 12: qemu-system-common, Debian 13: virtiofsd) or set the key")
}

func (c *Config) binary(key, path, name string, places []string, fix string) (string, error) {
	if path != "" {
		if err := checkExecutable(path); err != nil {
			return "", Faults{c.fault(key, fmt.Sprintf("%s: %s", path, reasonOf(err)), fix)}
		}
		return path, nil
	}
	// exec.LookPath refuses what it found relative to the working folder; the shim's is the bundle.
	if found, err := exec.LookPath(name); err == nil && filepath.IsAbs(found) {
		return found, nil
	}
	for _, dir := range places {
		if p := filepath.Join(dir, name); checkExecutable(p) == nil {
			return p, nil
		}
	}
	return "", Faults{c.fault(key, fmt.Sprintf("%s was not found in PATH, %s", name, strings.Join(places, ", ")), fix)}
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

// qemuArch is an architecture as QEMU names it.
func qemuArch(arch string) string {
	switch arch {
	case ArchAMD64:
		return "x86_64"
	case "arm64":
		return "aarch64"
	default:
		return arch
	}
}
