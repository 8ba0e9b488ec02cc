// SPDX-License-Identifier: Apache-2.0

package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// control is the device mapper's own device, which the kernel makes with its module dm_mod.
const control = "/dev/mapper/control"

// SectorSize is the unit of tables, bytes, whatever sectors a disk has.
const SectorSize = 512

// From linux/dm-ioctl.h: ioctls of struct dm_ioctl, and its flags.
const (
	deviceCreate  = 0xc138fd03 // DM_DEV_CREATE
	deviceRemove  = 0xc138fd04 // DM_DEV_REMOVE
	deviceSuspend = 0xc138fd06 // DM_DEV_SUSPEND; without a flag it resumes
	tableLoad     = 0xc138fd09 // DM_TABLE_LOAD

	flagSecureData = 1 << 15 // DM_SECURE_DATA_FLAG

	versionMajor = 4 // DM_VERSION_MAJOR
)

// Sizes and offsets of struct dm_ioctl and struct dm_target_spec, bytes. Both are the same on all 64-bit architectures.
const (
	headerSize     = 312
	offDataSize    = 12
	offDataStart   = 16
	offTargetCount = 20
	offFlags       = 28
	offDev         = 40
	offName        = 48
	nameSize       = 128

	specSize      = 40
	offSpecLength = 8
	offSpecNext   = 20
	offSpecType   = 24
	typeSize      = 16
)

// maxParameters bounds what a target is given, bytes. The kernel takes more; nothing here needs it.
const maxParameters = 4096

// Target is a table of one line: what all of a device's sectors map to.
type Target struct {
	// Type is the target's name, such as "crypt".
	Type string
	// Sectors is the device's size in units of SectorSize.
	Sectors uint64
	// Parameters are the rest of the line, as the kernel's documentation of the target has them.
	Parameters []byte
}

// Create makes an active device and returns the path of its node. If it fails, nothing is left. The error is
// errdefs.ErrInvalidArgument for what the kernel would not understand, else the kernel's; it does not show the parameters.
func Create(name string, t Target) (path string, err error) {
	create, err := request(name, nil)
	if err != nil {
		return "", err
	}
	load, err := request(name, &t)
	if err != nil {
		return "", err
	}
	defer clear(load)
	ctl, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("device mapper: %w", err)
	}
	defer ctl.Close()
	if err := call(ctl, deviceCreate, create); err != nil {
		return "", fmt.Errorf("make the mapped device %s: %w", name, err)
	}
	dev := binary.NativeEndian.Uint64(create[offDev:])
	if err := activate(ctl, name, load); err != nil {
		return "", errors.Join(fmt.Errorf("mapped device %s (%s): %w", name, t.Type, err), Remove(name))
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(dev)), nil
}

func activate(ctl *os.File, name string, load []byte) error {
	if err := call(ctl, tableLoad, load); err != nil {
		return fmt.Errorf("load its table (the kernel's log says more): %w", err)
	}
	resume, err := request(name, nil)
	if err != nil {
		return err
	}
	if err := call(ctl, deviceSuspend, resume); err != nil {
		return fmt.Errorf("activate it: %w", err)
	}
	return nil
}

// Remove ends a device that nobody uses.
func Remove(name string) error {
	remove, err := request(name, nil)
	if err != nil {
		return err
	}
	ctl, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("device mapper: %w", err)
	}
	defer ctl.Close()
	if err := call(ctl, deviceRemove, remove); err != nil {
		return fmt.Errorf("remove the mapped device %s: %w", name, err)
	}
	return nil
}

// request encodes struct dm_ioctl for a device, with a table of one target or without.
func request(name string, t *Target) ([]byte, error) {
	if name == "" || len(name) >= nameSize || bytes.ContainsAny([]byte(name), "/\x00") {
		return nil, fmt.Errorf("name of a mapped device %.40q: %w", name, errdefs.ErrInvalidArgument)
	}
	size := headerSize
	if t != nil {
		switch {
		case t.Type == "" || len(t.Type) >= typeSize:
			return nil, fmt.Errorf("target %.40q of the mapped device %s: %w", t.Type, name, errdefs.ErrInvalidArgument)
		case t.Sectors == 0:
			return nil, fmt.Errorf("mapped device %s of no sectors: %w", name, errdefs.ErrInvalidArgument)
		case len(t.Parameters) > maxParameters || bytes.IndexByte(t.Parameters, 0) >= 0:
			return nil, fmt.Errorf("%d bytes of parameters of the mapped device %s: %w", len(t.Parameters), name, errdefs.ErrInvalidArgument)
		}
		const align = 8
		size += (specSize + len(t.Parameters) + 1 + align - 1) / align * align
	}
	b := make([]byte, size)
	order := binary.NativeEndian
	order.PutUint32(b, versionMajor)
	order.PutUint32(b[offDataSize:], uint32(size))
	order.PutUint32(b[offDataStart:], headerSize)
	copy(b[offName:], name)
	if t == nil {
		return b, nil
	}
	order.PutUint32(b[offTargetCount:], 1)
	order.PutUint32(b[offFlags:], flagSecureData)
	spec := b[headerSize:]
	order.PutUint64(spec[offSpecLength:], t.Sectors)
	order.PutUint32(spec[offSpecNext:], uint32(len(spec)))
	copy(spec[offSpecType:], t.Type)
	copy(spec[specSize:], t.Parameters)
	return b, nil
}

func call(ctl *os.File, command uintptr, b []byte) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, ctl.Fd(), command, uintptr(unsafe.Pointer(&b[0])))
		runtime.KeepAlive(b)
		if errors.Is(errno, unix.EINTR) {
			continue
		}
		if errno != 0 {
			return errno
		}
		return nil
	}
}
