// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/uevent"
)

// validSerial is hypervisor.Disk.Serial's rule, 1 to 20 of [A-Za-z0-9_-]; virtio-blk carries no more.
func validSerial(s string) bool {
	const longest = 20
	return s != "" && len(s) <= longest && strings.IndexFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-')
	}) < 0
}

// diskFinder finds disks by their serial number. It is used by one goroutine.
type diskFinder interface {
	// find waits until the disk is there, or ctx ends, and opens it. The path in os.File.Name is the disk's for as
	// long as the file is open.
	find(ctx context.Context, serial string) (*os.File, error)
	close()
}

// sysfsDisks finds disks in sysfs.
type sysfsDisks struct {
	block, dev string
	events     *uevent.Listener
	// names of disks by serial, from the last look.
	names map[string]string
}

func newSysfsDisks(block, dev string) (*sysfsDisks, error) {
	events, err := uevent.Listen()
	if err != nil {
		return nil, err
	}
	return &sysfsDisks{block: block, dev: dev, events: events}, nil
}

func (d *sysfsDisks) close() { d.events.Close() }

func (d *sysfsDisks) find(ctx context.Context, serial string) (*os.File, error) {
	var file *os.File
	err := d.events.Await(ctx, "block", func() (bool, error) {
		for _, rescan := range []bool{false, true} {
			if rescan {
				if err := d.scan(); err != nil {
					return false, err
				}
			}
			name, ok := d.names[serial]
			if !ok {
				continue
			}
			var err error
			if file, err = d.open(name, serial); err == nil {
				return true, nil
			}
			if !errors.Is(err, errNotThatDisk) {
				return false, err
			}
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("disk with serial number %s (%d disks are there): %w", serial, len(d.names), err)
	}
	return file, nil
}

// scan reads the serial numbers of all disks.
func (d *sysfsDisks) scan() error {
	entries, err := os.ReadDir(d.block)
	if err != nil {
		return fmt.Errorf("list disks: %w", err)
	}
	d.names = map[string]string{}
	for _, e := range entries {
		serial, err := readSerial(filepath.Join(d.block, e.Name()))
		if err != nil || serial == "" {
			continue // it has none, or it just went
		}
		if other, ok := d.names[serial]; ok {
			return fmt.Errorf("disks %s and %s have the same serial number %q: %w", other, e.Name(), serial, errdefs.ErrFailedPrecondition)
		}
		d.names[serial] = e.Name()
	}
	return nil
}

// errNotThatDisk says that a name belongs to another disk now.
var errNotThatDisk = errors.New("the disk changed")

// open opens a disk and makes sure that it is the one with the serial: names are used again when a disk goes, but not
// while one is open.
func (d *sysfsDisks) open(name, serial string) (*os.File, error) {
	fd, err := unix.Open(filepath.Join(d.dev, name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return nil, errNotThatDisk
	}
	if err != nil {
		return nil, fmt.Errorf("open /dev/%s: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), filepath.Join(d.dev, name))
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		_ = file.Close()
		return nil, err
	}
	number, err := os.ReadFile(filepath.Join(d.block, name, "dev"))
	found, serialErr := readSerial(filepath.Join(d.block, name))
	want := strconv.FormatUint(uint64(unix.Major(stat.Rdev)), 10) + ":" + strconv.FormatUint(uint64(unix.Minor(stat.Rdev)), 10)
	if err != nil || serialErr != nil || strings.TrimSpace(string(number)) != want || found != serial {
		_ = file.Close()
		return nil, errNotThatDisk
	}
	return file, nil
}

// maxVPD is the most that sysfs gives of a vital product data page, bytes.
const maxVPD = 4 << 10

// readSerial reads the serial number of a disk from its directory in sysfs. SCSI disks have it in page 0x80 of their vital
// product data, virtio-blk in a file of its own.
func readSerial(dir string) (string, error) {
	page, err := readLimited(filepath.Join(dir, "device", "vpd_pg80"))
	if err == nil {
		return parseSerialPage(page)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	text, err := readLimited(filepath.Join(dir, "serial"))
	return strings.TrimSpace(string(text)), err
}

func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxVPD))
}

// parseSerialPage reads a Unit Serial Number page (SPC-4, 7.8.13): device type, page code 0x80, 16 bits of length, and
// the serial number in ASCII, padded with spaces.
func parseSerialPage(page []byte) (string, error) {
	const head = 4
	if len(page) < head || page[1] != 0x80 {
		return "", errors.New("not a page with a serial number")
	}
	n := int(binary.BigEndian.Uint16(page[2:]))
	if n > len(page)-head {
		return "", fmt.Errorf("serial number of %d bytes in a page of %d", n, len(page))
	}
	return strings.Trim(string(page[head:head+n]), " \x00"), nil
}
