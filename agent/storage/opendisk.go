// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"io"
)

// OpenDisk waits until the disk with the serial number is there, or ctx ends, and opens it for reading.
func OpenDisk(ctx context.Context, serial string) (io.ReadCloser, error) {
	disks, err := newSysfsDisks(sysBlock, devices)
	if err != nil {
		return nil, err
	}
	defer disks.close()
	return disks.find(ctx, serial)
}

// HasDisk reports whether a disk with the serial number is there now.
func HasDisk(serial string) (bool, error) {
	disks := &sysfsDisks{block: sysBlock}
	if err := disks.scan(); err != nil {
		return false, err
	}
	_, found := disks.names[serial]
	return found, nil
}
