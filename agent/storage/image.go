// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// maxExtraDevices bounds the further disks of a layer.
const maxExtraDevices = 500

// image is a mounted file system image that containers share. Store.mu guards refs and gone.
type image struct {
	// serials of its disks, the first one first.
	serials []string
	path    string
	// mounted is closed when the mounting has ended; err is valid then.
	mounted chan struct{}
	err     error
	refs    int
	// gone is not nil while it is being unmounted, and closed after.
	gone chan struct{}
}

// checkLayer returns the serial numbers of a layer's disks.
func checkLayer(l *agentv1.Layer) ([]string, error) {
	if l.GetFilesystem() != "erofs" {
		return nil, fmt.Errorf("layer %.40q has file system %.40q, only erofs is known: %w", l.GetSerial(), l.GetFilesystem(),
			errdefs.ErrInvalidArgument)
	}
	if len(l.GetExtraSerials()) > maxExtraDevices {
		return nil, fmt.Errorf("layer %.40q has %d further disks, the limit is %d: %w", l.GetSerial(), len(l.GetExtraSerials()), maxExtraDevices,
			errdefs.ErrInvalidArgument)
	}
	serials := append([]string{l.GetSerial()}, l.GetExtraSerials()...)
	seen := map[string]bool{}
	for _, serial := range serials {
		if !validSerial(serial) {
			return nil, fmt.Errorf("serial number %.40q is not 1 to 20 of [A-Za-z0-9_-]: %w", serial, errdefs.ErrInvalidArgument)
		}
		if seen[serial] {
			return nil, fmt.Errorf("layer %s names the disk %s twice: %w", l.GetSerial(), serial, errdefs.ErrInvalidArgument)
		}
		seen[serial] = true
	}
	return serials, nil
}

// acquireImage returns the image on the disks, mounted, and counts the caller as a user. The caller calls releaseImage.
func (s *Store) acquireImage(ctx context.Context, disks diskFinder, serials []string) (*image, error) {
	for {
		s.mu.Lock()
		im := s.images[serials[0]]
		switch {
		case im == nil:
			im = &image{serials: serials, mounted: make(chan struct{}), refs: 1}
			s.images[serials[0]] = im
			for _, serial := range serials {
				s.diskUsers[serial]++
			}
			s.mu.Unlock()
			im.path = s.place("layers")
			im.err = mountImage(ctx, disks, im)
			if im.err != nil {
				s.mu.Lock()
				s.forgetImage(im)
				s.mu.Unlock()
			}
			close(im.mounted)
			return im, im.err

		case im.gone != nil:
			gone := im.gone
			s.mu.Unlock()
			if err := waitFor(ctx, gone); err != nil {
				return nil, fmt.Errorf("wait until layer %s is unmounted: %w", serials[0], err)
			}

		case !slices.Equal(im.serials, serials):
			s.mu.Unlock()
			return nil, fmt.Errorf("layer %s is in use with further disks %s, not %s: %w", serials[0],
				strings.Join(im.serials[1:], ","), strings.Join(serials[1:], ","), errdefs.ErrInvalidArgument)

		default:
			im.refs++
			s.mu.Unlock()
			if err := waitFor(ctx, im.mounted); err != nil {
				_, releaseErr := s.releaseImage(im)
				return nil, errors.Join(fmt.Errorf("wait until layer %s is mounted: %w", serials[0], err), releaseErr)
			}
			if im.err == nil {
				return im, nil
			}
			// The one who tried gave up, perhaps only because its own time was over: try again.
			if !errors.Is(im.err, context.Canceled) && !errors.Is(im.err, context.DeadlineExceeded) {
				return nil, im.err
			}
		}
	}
}

func waitFor(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// forgetImage removes an image that is not mounted from the tables and returns the disks that nobody uses any more. The
// caller holds s.mu.
func (s *Store) forgetImage(im *image) (released []string) {
	delete(s.images, im.serials[0])
	for _, serial := range im.serials {
		if s.diskUsers[serial]--; s.diskUsers[serial] == 0 {
			delete(s.diskUsers, serial)
			released = append(released, serial)
		}
	}
	return released
}

// releaseImage ends one use of an image that acquireImage gave. The last user's call unmounts and tells which disks are free.
// After an error the use is
// still there.
func (s *Store) releaseImage(im *image) (released []string, err error) {
	s.mu.Lock()
	if s.images[im.serials[0]] != im { // its mounting failed while the caller waited for it
		s.mu.Unlock()
		return nil, nil
	}
	if im.refs > 1 {
		im.refs--
		s.mu.Unlock()
		return nil, nil
	}
	gone := make(chan struct{})
	im.gone = gone
	s.mu.Unlock()

	// It is mounted: while it is being mounted the one who mounts is a user too.
	if err = unmount(im.path, 0); err == nil {
		err = os.Remove(im.path)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(gone)
	im.gone = nil
	if err != nil {
		return nil, err
	}
	return s.forgetImage(im), nil
}

// mountImage finds the image's disks and mounts it.
func mountImage(ctx context.Context, disks diskFinder, im *image) error {
	var options []option
	for i, serial := range im.serials {
		disk, err := disks.find(ctx, serial)
		if err != nil {
			return err
		}
		// The name is the disk's as long as it is open; from then on the file system holds it.
		defer disk.Close()
		key := "device"
		if i == 0 {
			key = "source"
		}
		options = append(options, option{key, disk.Name()})
	}
	if err := os.Mkdir(im.path, 0o711); err != nil {
		return err
	}
	attrs := unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOATIME
	if err := mountFS("erofs", im.path, attrs, append([]option{{"ro", ""}}, options...)...); err != nil {
		return errors.Join(err, os.Remove(im.path))
	}
	return nil
}
