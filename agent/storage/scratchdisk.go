// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/storage/ext4"
)

// scratchDiskTime bounds the making of the scratch disk's file system, the wait for the disk included.
const scratchDiskTime = 2 * time.Minute

// trash is where trees of the scratch disk go that are being deleted.
const trash = "trash"

// scratchDisk is the pod's scratch disk with a file system that was made here. path and err are valid once ready is closed.
type scratchDisk struct {
	serial string
	ready  chan struct{}
	path   string
	err    error
}

// SetupScratch has a file system made on the disk with the serial number, in the background: writable layers and scratch volumes
// that come later are on it. What was on the disk is lost, and never read. Without a serial number they are in memory. A
// confidential guest encrypts all that it writes there.
func (s *Store) SetupScratch(serial string) error {
	switch {
	case serial == "":
		return nil
	case !validSerial(serial):
		return fmt.Errorf("serial number of the scratch disk %.40q is not 1 to 20 of [A-Za-z0-9_-]: %w", serial, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disk != nil {
		return fmt.Errorf("the pod has the scratch disk %s already: %w", s.disk.serial, errdefs.ErrAlreadyExists)
	}
	d := &scratchDisk{serial: serial, ready: make(chan struct{}), path: filepath.Join(s.root, "disk")}
	s.disk = d
	s.background.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), scratchDiskTime)
		defer cancel()
		if err := s.makeScratchDisk(ctx, d); err != nil {
			d.err = fmt.Errorf("scratch disk: %w", err)
			log.G(ctx).WithError(d.err).Error("the pod has no place for what its containers write")
		}
		close(d.ready)
	})
	return nil
}

func (s *Store) makeScratchDisk(ctx context.Context, d *scratchDisk) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	disks, err := s.newDisks()
	if err != nil {
		return err
	}
	defer disks.close()
	found, err := disks.find(ctx, d.serial)
	if err != nil {
		return err
	}
	defer found.Close() // its name is this disk's as long as it is open
	if s.platform == "" {
		return s.makeScratchFS(d, found.Name(), option{"discard", ""})
	}
	size, err := diskSize(found)
	if err != nil {
		return err
	}
	device, err := encryptDisk(found.Name(), size)
	if err != nil {
		return fmt.Errorf("encrypt %s: %w", found.Name(), err)
	}
	// No discards: the host would learn what is free, and dm-integrity takes anything for the content of a discarded block.
	// No reading ahead in inode tables, where blocks that were never written have no tag.
	if err := s.makeScratchFS(d, device, option{"inode_readahead_blks", "0"}); err != nil {
		return errors.Join(err, discardEncrypted())
	}
	return nil
}

// makeScratchFS formats a device and mounts it.
func (s *Store) makeScratchFS(d *scratchDisk, device string, options ...option) error {
	if err := formatDisk(device); err != nil {
		return err
	}
	// Nothing here outlives the guest, so that nothing has to be on the host's disk at any time.
	options = append(options, option{"source", device}, option{"prjquota", ""}, option{"nobarrier", ""})
	if err := mountFS("ext4", d.path, 0, options...); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(d.path, trash), 0o700); err != nil {
		return errors.Join(err, unmount(d.path, 0))
	}
	return nil
}

// formatDisk makes the file system. The disk is a sparse file of the host's, made for this pod. Under encryption it does not read
// as zeros where it was never written, but cannot be read: Options.Zeroed holds as well, since nothing is read there then.
func formatDisk(path string) error {
	o := ext4.Options{Label: "scratch", Now: time.Now(), Zeroed: true, ProjectQuota: true, RootMode: 0o711}
	_, _ = rand.Read(o.UUID[:]) // never fails
	_, _ = rand.Read(o.HashSeed[:])
	disk, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	size, err := disk.Seek(0, io.SeekEnd)
	if err == nil {
		err = ext4.Format(disk, size-size%4096, o)
	}
	return errors.Join(err, disk.Close())
}

// onDisk makes a directory on the scratch disk, with a quota of its own of so many bytes (0: none); empty if the pod has no
// scratch disk. All that is made below it counts.
func (s *Store) onDisk(ctx context.Context, bytes uint64) (string, error) {
	s.mu.Lock()
	d := s.disk
	s.names++
	project := uint32(s.names)
	s.mu.Unlock()
	if d == nil {
		return "", nil
	}
	if err := waitFor(ctx, d.ready); err != nil {
		return "", fmt.Errorf("wait for the scratch disk: %w", err)
	}
	if d.err != nil {
		return "", d.err
	}
	path := filepath.Join(d.path, strconv.FormatUint(uint64(project), 10))
	if err := os.Mkdir(path, 0o711); err != nil {
		return "", err
	}
	if err := limitTree(path, project, bytes); err != nil {
		return "", errors.Join(fmt.Errorf("limit %s: %w", path, err), os.Remove(path))
	}
	return path, nil
}

// discard deletes a tree of the scratch disk. It is gone from its place at once; its blocks are freed in the background, since
// containers make trees of any size.
func (s *Store) discard(path string) error {
	to := filepath.Join(filepath.Dir(path), trash, filepath.Base(path))
	if err := os.Rename(path, to); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	s.background.Go(func() {
		if err := os.RemoveAll(to); err != nil {
			log.L.WithError(err).Warn("what a container wrote still takes room on the scratch disk")
		}
	})
	return nil
}
