// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How openDevice came to a device.
const (
	openedAtOnce  = "opened at once"
	openedWithout = "the container's device rules refused it; opened without them"
)

// openDevice opens the character device of a directory of sysfs. The container's /dev does not have the guest's devices, so
// a node is made for it. The device rules of a container, also of a privileged one, let it make the node and not open
// it; being privileged it may take the rules off its own cgroup, which is what happens then.
func openDevice(directory string) (_ *os.File, how string, err error) {
	text, err := os.ReadFile(filepath.Join(directory, "dev"))
	if err != nil {
		return nil, "", err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "%d:%d", &major, &minor); err != nil {
		return nil, "", fmt.Errorf("%s/dev is %.40q, no device number: %w", directory, text, err)
	}
	node := filepath.Join("/dev", fmt.Sprintf("evidence-%d", os.Getpid()))
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return nil, "", fmt.Errorf("make a node for device %d:%d: %w", major, minor, err)
	}
	defer func() { err = errors.Join(err, os.Remove(node)) }()
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err == nil {
		return f, openedAtOnce, nil
	}
	if !errors.Is(err, unix.EPERM) {
		return nil, "", fmt.Errorf("open device %d:%d: %w", major, minor, err)
	}
	if err := dropDeviceRules(); err != nil {
		return nil, "", fmt.Errorf("take the device rules off the container: %w", err)
	}
	if f, err = os.OpenFile(node, os.O_RDWR, 0); err != nil {
		return nil, "", fmt.Errorf("open device %d:%d without device rules: %w", major, minor, err)
	}
	return f, openedWithout, nil
}

// dropDeviceRules detaches the BPF programs that are the device rules of this process's cgroup, the root of what it sees
// of the cgroups: bpf(2).
func dropDeviceRules() error {
	cgroup, err := os.Open("/sys/fs/cgroup")
	if err != nil {
		return err
	}
	defer cgroup.Close()
	var ids [64]uint32
	query := struct {
		target, kind, flags, attachFlags uint32
		ids                              uint64
		count, _                         uint32
	}{target: uint32(cgroup.Fd()), kind: unix.BPF_CGROUP_DEVICE, count: uint32(len(ids))}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&ids)
	query.ids = uint64(uintptr(unsafe.Pointer(&ids)))
	if _, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&query), unsafe.Sizeof(query)); err != nil {
		return fmt.Errorf("list them: %w", err)
	}
	for _, id := range ids[:query.count] {
		get := struct{ id, next, flags uint32 }{id: id}
		program, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&get), unsafe.Sizeof(get))
		if err != nil {
			return fmt.Errorf("get program %d: %w", id, err)
		}
		detach := struct{ target, program, kind, flags uint32 }{target: uint32(cgroup.Fd()), program: uint32(program),
			kind: unix.BPF_CGROUP_DEVICE}
		_, err = bpf(unix.BPF_PROG_DETACH, unsafe.Pointer(&detach), unsafe.Sizeof(detach))
		_ = unix.Close(int(program))
		if err != nil {
			return fmt.Errorf("detach program %d: %w", id, err)
		}
	}
	return nil
}

func bpf(command uintptr, attributes unsafe.Pointer, size uintptr) (uintptr, error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attributes), size)
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}
