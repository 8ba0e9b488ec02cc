// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"

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
	case v.GetUid() == math.MaxUint32 || v.GetGid() == math.MaxUint32:
		return fmt.Errorf("owner %d:%d of a scratch volume: %w", v.GetUid(), v.GetGid(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// bindScratch returns the place of a scratch volume. The first mount makes it, as that mount says; it stays until the pod
// ends.
func (s *Store) bindScratch(ctx context.Context, v *agentv1.ScratchVolume) (string, error) {
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

	sc.path = s.place("scratch")
	if sc.err = makeScratch(sc.path, v); sc.err != nil {
		s.mu.Lock()
		delete(s.scratch, v.GetName())
		s.mu.Unlock()
	}
	close(sc.made)
	return sc.path, sc.err
}

func makeScratch(path string, v *agentv1.ScratchVolume) error {
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
	if err := mountFS("tmpfs", path, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, options...); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}
