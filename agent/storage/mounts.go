// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// PrepareMounts turns a container's mounts into those of its runtime configuration, in the same order. File systems of
// the guest's kernel stay as they are; everything else becomes a bind mount of a place in the Store. If PrepareMounts
// fails nothing of it is left.
func (s *Store) PrepareMounts(ctx context.Context, containerID string, mounts []*agentv1.Mount) ([]specs.Mount, error) {
	if err := checkMounts(mounts); err != nil {
		return nil, err
	}
	c, err := s.enter(ctx, containerID)
	if err != nil {
		return nil, err
	}
	defer s.leave(containerID, c)
	if c.prepared {
		return nil, fmt.Errorf("mounts of container %s: %w", containerID, errdefs.ErrAlreadyExists)
	}
	keep := len(c.done)
	out := make([]specs.Mount, 0, len(mounts))
	for i, m := range mounts {
		prepared, err := s.prepare(ctx, c, i, m)
		if err != nil {
			return nil, s.rollback(c, keep, fmt.Errorf("mount %d (at %s) of container %s: %w", i+1, m.GetDestination(), containerID, err))
		}
		out = append(out, prepared)
	}
	c.prepared = true
	return out, nil
}

// checkMounts checks all that can be told from the request alone.
func checkMounts(mounts []*agentv1.Mount) error {
	if len(mounts) > wire.MaxMounts {
		return fmt.Errorf("%d mounts, the limit is %d: %w", len(mounts), wire.MaxMounts, errdefs.ErrInvalidArgument)
	}
	copies, terminationLogs := 0, 0
	for i, m := range mounts {
		err := checkDestination(m.GetDestination())
		if m.GetIdMapped() && (m.GetFilesystem() != nil || m.GetShared() != nil) {
			err = errors.Join(err, fmt.Errorf("it is not a mount that can have its ids mapped here: %w", errdefs.ErrInvalidArgument))
		}
		switch source := m.GetSource().(type) {
		case *agentv1.Mount_Filesystem:
			err = errors.Join(err, checkOptions(source.Filesystem.GetType(), m.GetOptions()))
		case *agentv1.Mount_File:
			copies += len(source.File.GetContent())
			if source.File.GetTerminationLog() {
				if terminationLogs++; terminationLogs > 1 {
					err = errors.Join(err, fmt.Errorf("it is the second termination log: %w", errdefs.ErrInvalidArgument))
				}
			}
			err = errors.Join(err, checkOptions(bindMount, m.GetOptions()), checkFile(source.File))
		case *agentv1.Mount_PodShm:
			err = errors.Join(err, checkOptions(bindMount, m.GetOptions()))
		case *agentv1.Mount_Shared:
			err = errors.Join(err, checkOptions(bindMount, m.GetOptions()), checkShared(source.Shared))
		case *agentv1.Mount_Volume:
			err = errors.Join(err, checkOptions(bindMount, m.GetOptions()), checkPodVolume(source.Volume))
		case *agentv1.Mount_Scratch:
			err = errors.Join(err, checkOptions(bindMount, m.GetOptions()), checkScratch(source.Scratch))
		default:
			err = errors.Join(err, fmt.Errorf("has no source that is known: %w", errdefs.ErrInvalidArgument))
		}
		if err != nil {
			return fmt.Errorf("mount %d (at %.80q): %w", i+1, m.GetDestination(), err)
		}
	}
	if copies > wire.MaxFileCopies {
		return fmt.Errorf("copied files have %d bytes together, the limit is %d: %w", copies, wire.MaxFileCopies, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkDestination(path string) error {
	if !filepath.IsAbs(path) || len(path) >= unix.PathMax || strings.ContainsRune(path, 0) || filepath.Clean(path) == "/" {
		return fmt.Errorf("destination is not an absolute path below /: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkPodVolume(v *agentv1.PodVolume) error {
	if !validVolumeName(v.GetName()) {
		return fmt.Errorf("name of a volume %.80q: %w", v.GetName(), errdefs.ErrInvalidArgument)
	}
	if v.GetPath() == "" {
		return nil
	}
	return checkVolumePath(v.GetPath())
}

func checkFile(f *agentv1.FileCopy) error {
	const noID = 1<<32 - 1 // (uid_t)-1, "leave as it is" to chown
	switch {
	case len(f.GetContent()) > wire.MaxFileCopy:
		return fmt.Errorf("copied file has %d bytes, the limit is %d: %w", len(f.GetContent()), wire.MaxFileCopy, errdefs.ErrInvalidArgument)
	case f.GetMode()&^0o777 != 0:
		return fmt.Errorf("mode %#o of a copied file is more than permission bits: %w", f.GetMode(), errdefs.ErrInvalidArgument)
	case f.GetUid() == noID || f.GetGid() == noID:
		return fmt.Errorf("owner %d:%d of a copied file: %w", f.GetUid(), f.GetGid(), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Store) prepare(ctx context.Context, c *container, index int, m *agentv1.Mount) (specs.Mount, error) {
	out := specs.Mount{Destination: filepath.Clean(m.GetDestination()), Options: slices.Clone(m.GetOptions())}
	if fs, ok := m.GetSource().(*agentv1.Mount_Filesystem); ok {
		out.Type, out.Source = fs.Filesystem.GetType(), fs.Filesystem.GetType()
		return out, nil
	}
	if err := s.directory(c); err != nil {
		return out, err
	}
	out.Type = "bind"
	if !slices.Contains(out.Options, "bind") && !slices.Contains(out.Options, "rbind") {
		out.Options = append(out.Options, "rbind")
	}
	var err error
	switch source := m.GetSource().(type) {
	case *agentv1.Mount_PodShm:
		s.mu.Lock()
		ready := s.shm
		s.mu.Unlock()
		if !ready {
			return out, fmt.Errorf("the pod has no /dev/shm yet: %w", errdefs.ErrFailedPrecondition)
		}
		out.Source = s.shmPath()
	case *agentv1.Mount_File:
		out.Source, err = s.copyFile(c, index, source.File)
		if err == nil && source.File.GetTerminationLog() {
			s.mu.Lock()
			c.terminationLog = out.Source
			s.mu.Unlock()
		}
	case *agentv1.Mount_Shared:
		out.Source, err = s.bindShared(c, index, source.Shared)
		// A bind mount with flags of its own forgets those of its source.
		out.Options = harmless(out.Options)
	case *agentv1.Mount_Volume:
		out.Source, err = s.bindVolume(ctx, c, index, source.Volume)
		out.Options = readOnly(out.Options)
	case *agentv1.Mount_Scratch:
		out.Source, err = s.bindScratch(ctx, c, index, source.Scratch)
	}
	if m.GetIdMapped() {
		out.Options = append(out.Options, "idmap") // libcontainer takes the map of the container's user namespace
	}
	return out, err
}

// copyFile writes a file to a place of the container's and returns its path.
func (s *Store) copyFile(c *container, index int, f *agentv1.FileCopy) (path string, err error) {
	dir, err := unix.Open(c.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	name := fmt.Sprintf("f%d", index)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC,
		Mode:    0o600,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return "", fmt.Errorf("make a file: %w", err)
	}
	path = filepath.Join(c.dir, name)
	c.done = append(c.done, step{path: path})
	file := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.Write(f.GetContent()); err != nil {
		return "", err
	}
	// The owner first: a change of owner may take mode bits away.
	if err := unix.Fchown(fd, int(f.GetUid()), int(f.GetGid())); err != nil {
		return "", fmt.Errorf("give a file to %d:%d: %w", f.GetUid(), f.GetGid(), err)
	}
	if err := unix.Fchmod(fd, f.GetMode()); err != nil {
		return "", fmt.Errorf("set mode %#o: %w", f.GetMode(), err)
	}
	return path, nil
}
