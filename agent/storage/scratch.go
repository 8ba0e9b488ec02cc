// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// maxScratch is more than a guest has of memory, bytes. Near 2^64 the kernel's rounding up gives 0, which is no limit.
const maxScratch = 1 << 50

// scratch is an empty directory for the containers of the pod. path and err are valid once made is closed.
type scratch struct {
	path string
	made chan struct{}
	err  error
}

func checkScratch(v *agentv1.ScratchVolume) error {
	switch {
	case !validVolumeName(v.GetName()):
		return fmt.Errorf("name of a scratch volume %.80q is not 1 to 64 of [a-z0-9.-], not starting with a dot: %w", v.GetName(),
			errdefs.ErrInvalidArgument)
	case v.GetSizeBytes() > maxScratch:
		return fmt.Errorf("scratch volume of %d bytes: %w", v.GetSizeBytes(), errdefs.ErrInvalidArgument)
	case v.GetMode()&^0o7777 != 0:
		return fmt.Errorf("mode %#o of a scratch volume is more than permission bits: %w", v.GetMode(), errdefs.ErrInvalidArgument)
	case v.GetPath() != "" && checkVolumePath(v.GetPath()) != nil:
		return checkVolumePath(v.GetPath())
	case v.GetUid() == math.MaxUint32 || v.GetGid() == math.MaxUint32:
		return fmt.Errorf("owner %d:%d of a scratch volume: %w", v.GetUid(), v.GetGid(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// bindScratch returns the place of a scratch volume, or of a part of it.
func (s *Store) bindScratch(ctx context.Context, c *container, index int, v *agentv1.ScratchVolume) (string, error) {
	path, err := s.scratchVolume(ctx, v)
	if err != nil || v.GetPath() == "" {
		return path, err
	}
	fd, err := openPart(path, v)
	if err != nil {
		return "", fmt.Errorf("part %.80q of scratch volume %s: %w", v.GetPath(), v.GetName(), err)
	}
	defer unix.Close(fd)
	place, err := c.bindOpened(fmt.Sprintf("p%d", index), fd)
	if err != nil {
		return "", fmt.Errorf("bind part %.80q of scratch volume %s: %w", v.GetPath(), v.GetName(), err)
	}
	return place, nil
}

// openPart opens a part of a volume as it is. Directories that are missing are made. Containers change the volume meanwhile as
// they like, so no link in it is followed.
func openPart(path string, v *agentv1.ScratchVolume) (int, error) {
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	dir, err := unix.Open(path, flags|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, err
	}
	for name := range strings.SplitSeq(v.GetPath(), "/") {
		made := false
		if err := unix.Mkdirat(dir, name, 0o700); err == nil {
			made = true
		} else if !errors.Is(err, unix.EEXIST) {
			unix.Close(dir)
			return -1, err
		}
		fd, err := unix.Openat(dir, name, flags, 0)
		unix.Close(dir)
		if err != nil {
			return -1, err
		}
		dir = fd
		if made {
			if err := giveTo(fmt.Sprintf("/proc/self/fd/%d", fd), v); err != nil {
				unix.Close(fd)
				return -1, err
			}
		}
	}
	return dir, nil
}

// scratchVolume returns the place of a scratch volume. The first mount makes it, as that mount says; it stays until the pod
// ends.
func (s *Store) scratchVolume(ctx context.Context, v *agentv1.ScratchVolume) (string, error) {
	s.mu.Lock()
	if sc := s.scratch[v.GetName()]; sc != nil {
		s.mu.Unlock()
		if err := waitFor(ctx, sc.made); err != nil {
			return "", fmt.Errorf("wait until scratch volume %s is made: %w", v.GetName(), err)
		}
		return sc.path, sc.err
	}
	if len(s.scratch) >= wire.MaxVolumes {
		s.mu.Unlock()
		return "", fmt.Errorf("there are %d scratch volumes, the limit: %w", wire.MaxVolumes, errdefs.ErrResourceExhausted)
	}
	sc := &scratch{made: make(chan struct{})}
	s.scratch[v.GetName()] = sc
	s.mu.Unlock()

	if sc.path, sc.err = s.makeScratch(ctx, v); sc.err != nil {
		s.mu.Lock()
		delete(s.scratch, v.GetName())
		s.mu.Unlock()
	}
	close(sc.made)
	return sc.path, sc.err
}

func (s *Store) makeScratch(ctx context.Context, v *agentv1.ScratchVolume) (string, error) {
	if !v.GetMemory() {
		path, err := s.onDisk(ctx, v.GetSizeBytes())
		if err != nil {
			return "", fmt.Errorf("make scratch volume %s: %w", v.GetName(), err)
		}
		if path != "" {
			if err := giveTo(path, v); err != nil {
				return "", errors.Join(err, s.discard(path))
			}
			return path, nil
		}
	}
	path := s.place("scratch")
	return path, makeInMemory(path, v)
}

// giveTo sets owner and mode of a volume's directory. The owner first: a change of owner may take mode bits away.
func giveTo(path string, v *agentv1.ScratchVolume) error {
	if err := unix.Chown(path, int(v.GetUid()), int(v.GetGid())); err != nil {
		return fmt.Errorf("give scratch volume %s to %d:%d: %w", v.GetName(), v.GetUid(), v.GetGid(), err)
	}
	if err := unix.Chmod(path, v.GetMode()); err != nil {
		return fmt.Errorf("set mode %#o of scratch volume %s: %w", v.GetMode(), v.GetName(), err)
	}
	return nil
}

func makeInMemory(path string, v *agentv1.ScratchVolume) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return fmt.Errorf("make scratch volume %s: %w", v.GetName(), err)
	}
	decimal := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	options := []option{
		{"mode", "0" + strconv.FormatUint(uint64(v.GetMode()), 8)}, {"uid", decimal(v.GetUid())}, {"gid", decimal(v.GetGid())},
	}
	if size := v.GetSizeBytes(); size != 0 { // without one, half of the guest's memory
		options = append(options, option{"size", strconv.FormatUint(size, 10)})
	}
	if err := mountFS("tmpfs", path, 0, options...); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}
