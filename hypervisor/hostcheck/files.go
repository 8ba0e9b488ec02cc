// SPDX-License-Identifier: Apache-2.0

package hostcheck

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
)

// BootFile adds a fault if the file of a document's field is not there, empty or no regular file.
func BootFile(f *hypervisor.Faults, field, path string) {
	if fi, err := os.Stat(path); err != nil {
		f.Add("%s: %w", field, err)
	} else if !fi.Mode().IsRegular() || fi.Size() == 0 {
		f.Add("%s: %s is empty or no regular file", field, path)
	}
}

// StateDir adds a fault if a VM's state directory is not there.
func StateDir(f *hypervisor.Faults, path string) {
	if fi, err := os.Stat(path); err != nil || !fi.IsDir() || !filepath.IsAbs(path) {
		f.Add("state directory %q: no absolute path of a directory", path)
	}
}

// Taps adds a fault for each NIC of a document without a tap.
func Taps(f *hypervisor.Faults, doc hypervisor.Document, res hypervisor.Resources) {
	for _, n := range doc.NICs {
		if res.Taps[n.ID] == nil {
			f.Add("nic %s: no tap was given", n.ID)
		}
	}
}

// Image checks that there is an image of a disk at path: a block device (device is true) or a regular file that is not empty.
// The error is os.ErrNotExist and the like, or errdefs.ErrInvalidArgument.
func Image(path string) (device bool, err error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return false, err
	case fi.Mode().IsRegular() && fi.Size() == 0:
		return false, fmt.Errorf("disk image %s is empty: %w", path, errdefs.ErrInvalidArgument)
	case fi.Mode().IsRegular():
		return false, nil
	case fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		return true, nil
	}
	return false, fmt.Errorf("disk %s is neither a regular file nor a block device: %w", path, errdefs.ErrInvalidArgument)
}

// Memory returns errdefs.ErrResourceExhausted if the host has less memory than a VM is to have, in bytes. A shared memory file
// is not accounted for when it is made: without this the host would run out of memory later.
func Memory(bytes uint64) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("memory of the host: %w", err)
	}
	if total := uint64(info.Totalram) * uint64(info.Unit); bytes > total {
		return fmt.Errorf("the VM is to have %d MiB of memory and the host has %d MiB; lower the pod's limits or the configured memory: %w",
			bytes>>20, total>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}
