// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Limits of a pod's sysctls.
const (
	maxSysctls     = 256
	maxSysctlKey   = 256
	maxSysctlValue = 4096
)

// validElement checks one element of a key. A slash in it stands for a dot of an interface's name ("eth0/100").
func validElement(s string) bool {
	return s != "" && s[0] != '/' && strings.IndexFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '/')
	}) < 0
}

// SetSysctls sets kernel parameters of the pod: net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.*, in sysctl's
// notation with dots. errdefs.ErrInvalidArgument for others, before any is set; errdefs.ErrNotFound for one that the
// kernel does not have.
func (s *System) SetSysctls(values map[string]string) error {
	if err := checkSysctls(values); err != nil {
		return err
	}
	tree, err := openSysctls()
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, key := range slices.Sorted(maps.Keys(values)) {
		err := writeSysctl(tree, key, values[key])
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: the guest's kernel has no such parameter (%w)", err, errdefs.ErrNotFound)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func checkSysctls(values map[string]string) error {
	if len(values) > maxSysctls {
		return fmt.Errorf("%d sysctls, the limit is %d: %w", len(values), maxSysctls, errdefs.ErrInvalidArgument)
	}
	for key, value := range values {
		if _, err := sysctlPath(key); err != nil {
			return err
		}
		if scope := wire.ScopeOfSysctl(key); scope != wire.SysctlNetwork && scope != wire.SysctlIPC {
			return fmt.Errorf("sysctl %q is not one of net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*: %w", key,
				errdefs.ErrInvalidArgument)
		}
		if len(value) > maxSysctlValue || strings.ContainsAny(value, "\x00\n") {
			return fmt.Errorf("value of sysctl %q has a line break, a NUL or more than %d bytes: %w", key, maxSysctlValue,
				errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// sysctlPath turns "net.ipv4.conf.eth0/1.arp_notify" into "net/ipv4/conf/eth0.1/arp_notify".
func sysctlPath(key string) (string, error) {
	bad := len(key) > maxSysctlKey
	elements := strings.Split(key, ".")
	for i, e := range elements {
		bad = bad || !validElement(e)
		elements[i] = strings.ReplaceAll(e, "/", ".")
	}
	if bad {
		return "", fmt.Errorf("%.80q is not the name of a sysctl: %w", key, errdefs.ErrInvalidArgument)
	}
	return strings.Join(elements, "/"), nil
}

func openSysctls() (*os.File, error) {
	tree, err := os.Open("/proc/sys")
	if err != nil {
		return nil, fmt.Errorf("open the kernel's parameters: %w", err)
	}
	return tree, nil
}

// writeSysctl writes one parameter below tree. The name comes from outside, so that it is resolved in tree alone.
func writeSysctl(tree *os.File, key, value string) error {
	path, err := sysctlPath(key)
	if err != nil {
		return err
	}
	fd, err := unix.Openat2(int(tree.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_WRONLY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return fmt.Errorf("set sysctl %s=%q: %w", key, value, err)
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.WriteString(value)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s=%q: %w", key, value, err)
	}
	return nil
}
