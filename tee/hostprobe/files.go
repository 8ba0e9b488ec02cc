// SPDX-License-Identifier: Apache-2.0

package hostprobe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// maxFile bounds files that are read as a whole; those of sysfs are a page at most.
const maxFile = 64 << 10

func (h Host) path(path string) string {
	if h.Root == "" {
		return path
	}
	return filepath.Join(h.Root, path)
}

// ReadFile returns a small file's text without white space around it; ok is false if the file is not there.
func (h Host) ReadFile(path string) (text string, ok bool, err error) {
	f, err := os.Open(h.path(path))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "", false, nil
	case err != nil:
		return "", false, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return "", false, err
	case len(b) > maxFile:
		return "", false, fmt.Errorf("%s has more than %d bytes: %w", f.Name(), maxFile, errdefs.ErrOutOfRange)
	}
	return strings.TrimSpace(string(b)), true, nil
}

// ModuleParameter is a kernel module's parameter as /sys/module shows it, "Y" or "N" for a switch; ok is false if the
// module is not loaded or has no such parameter.
func (h Host) ModuleParameter(module, name string) (value string, ok bool, err error) {
	return h.ReadFile(filepath.Join("/sys/module", module, "parameters", name))
}

// ModuleLoaded reports whether the kernel has a module, loaded or built in with parameters.
func (h Host) ModuleLoaded(module string) bool {
	fi, err := os.Stat(h.path(filepath.Join("/sys/module", module)))
	return err == nil && fi.IsDir()
}

// miscRoots are where the misc controller can be: cgroup v2, v2 beside v1, v1.
var miscRoots = [...]string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/misc"}

// Misc is a resource of the misc cgroup controller: sev, sev_es (SEV-ES and SEV-SNP guests), tdx; Documentation/
// admin-guide/cgroup-v2.rst, Misc. ok is false if this kernel does not count the resource, which says nothing about the
// platform.
func (h Host) Misc(resource string) (capacity, current uint64, ok bool, err error) {
	for _, root := range miscRoots {
		capacity, ok, err = h.miscValue(filepath.Join(root, "misc.capacity"), resource)
		if err != nil {
			return 0, 0, false, err
		}
		if !ok {
			continue
		}
		current, err = h.miscCurrent(root, resource)
		return capacity, current, err == nil, err
	}
	return 0, 0, false, nil
}

// miscCurrent adds up the cgroups below the root where the root itself, as in older kernels, does not tell.
func (h Host) miscCurrent(root, resource string) (uint64, error) {
	value, ok, err := h.miscValue(filepath.Join(root, "misc.current"), resource)
	if ok || err != nil {
		return value, err
	}
	entries, err := os.ReadDir(h.path(root))
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		value, _, err := h.miscValue(filepath.Join(root, e.Name(), "misc.current"), resource)
		if err != nil {
			return 0, err
		}
		sum += value
	}
	return sum, nil
}

// miscValue reads a file of lines "NAME NUMBER".
func (h Host) miscValue(path, resource string) (uint64, bool, error) {
	text, ok, err := h.ReadFile(path)
	if !ok || err != nil {
		return 0, false, err
	}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 2 || fields[0] != resource {
			continue
		}
		value, err := strconv.ParseUint(fields[1], 10, 64)
		if err != nil {
			return 0, false, fmt.Errorf("%s: %w", h.path(path), err)
		}
		return value, true, nil
	}
	return 0, false, nil
}

// CPUVendor is the first CPU's vendor: "GenuineIntel", "AuthenticAMD", "IBM/S390".
func (h Host) CPUVendor() (string, error) {
	value, _, err := h.cpuinfo("vendor_id")
	return value, err
}

// CPUFlags are the first CPU's: x86's line "flags", s390x's line "features". Empty: the kernel shows none.
func (h Host) CPUFlags() ([]string, error) {
	value, _, err := h.cpuinfo("flags", "features")
	return strings.Fields(value), err
}

// Facilities are the numbers of the facilities that an s390x machine has (z/Architecture Principles of Operation,
// "Facility Indications"); empty on other machines.
func (h Host) Facilities() ([]int, error) {
	value, _, err := h.cpuinfo("facilities")
	if err != nil {
		return nil, err
	}
	var out []int
	for field := range strings.FieldsSeq(value) {
		n, err := strconv.Atoi(field)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("/proc/cpuinfo has a facility %q: %w", field, errdefs.ErrInvalidArgument)
		}
		out = append(out, n)
	}
	return out, nil
}

// cpuinfo finds the first line of /proc/cpuinfo that has one of the names.
func (h Host) cpuinfo(names ...string) (value string, ok bool, err error) {
	f, err := os.Open(h.path("/proc/cpuinfo"))
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		name, value, found := strings.Cut(s.Text(), ":")
		if !found {
			continue
		}
		name = strings.TrimSpace(name)
		for _, want := range names {
			if name == want {
				return strings.TrimSpace(value), true, nil
			}
		}
	}
	return "", false, s.Err()
}

// CanOpen opens a file or device for reading and writing, as a VMM does, and closes it again. The error is
// errdefs.ErrNotFound, ErrPermissionDenied or ErrUnavailable.
func (h Host) CanOpen(path string) error {
	f, err := os.OpenFile(h.path(path), os.O_RDWR, 0)
	if err == nil {
		return f.Close()
	}
	return openError(path, err)
}

// CanConnect reports whether path is a unix socket. It does not connect: whether somebody listens is seen by who uses it.
// Errors as with CanOpen.
func (h Host) CanConnect(path string) error {
	fi, err := os.Stat(h.path(path))
	switch {
	case err != nil:
		return openError(path, err)
	case fi.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s is no socket: %w", path, errdefs.ErrUnavailable)
	}
	return nil
}

func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) }

func openError(path string, err error) error {
	switch {
	case absent(err):
		return kindError{path + " is not there", errdefs.ErrNotFound}
	case errors.Is(err, fs.ErrPermission):
		return kindError{"this user must not open " + path, errdefs.ErrPermissionDenied}
	}
	return fmt.Errorf("%w (%w)", err, errdefs.ErrUnavailable)
}

// kindError is an error of a kind whose own text says already what the kind's would repeat.
type kindError struct {
	text string
	kind error
}

func (e kindError) Error() string { return e.text }
func (e kindError) Unwrap() error { return e.kind }
