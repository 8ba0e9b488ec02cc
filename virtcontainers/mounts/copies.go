// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// readOnly returns the options with ro in place of all that say so or the opposite.
func readOnly(options []string) []string {
	return append(slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return o == "rw" || o == "rrw" || isReadOnly(o)
	}), "ro")
}

// isReadOnly reports whether an option makes a mount read-only, with the mounts in it (rro) or not.
func isReadOnly(option string) bool { return option == "ro" || option == "rro" }

// copied brings a volume into the guest, and mounts it or one file of it.
func (s *Set) copied(ctx context.Context, m Mount) (*agentv1.Mount_Volume, error) {
	where := m.Volume
	name, snapshot, err := s.volumes.Mount(ctx, where.Dir())
	if err != nil {
		return nil, err
	}
	if where.Rest != "" && !slices.ContainsFunc(snapshot.Files, func(f volumes.File) bool { return f.Path == where.Rest }) {
		return nil, refused("%s at %s: there is no such file in the volume; mount the volume, or one of its files",
			filepath.Join(where.Dir(), where.Rest), m.Destination)
	}
	return &agentv1.Mount_Volume{Volume: &agentv1.PodVolume{Name: name, Path: where.Rest}}, nil
}

// part mounts a part of a volume, as it is now: the kubelet does not change it either once it is mounted.
func (s *Set) part(ctx context.Context, m Mount, g *agentv1.Mount) error {
	info, err := os.Stat(m.Source)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", m.Destination, err)
	}
	if !info.IsDir() {
		g.Source, err = file(readFileCopy(m))
		return err
	}
	name, _, err := s.volumes.MountOnce(ctx, m.Source)
	if err != nil {
		return err
	}
	g.Source = &agentv1.Mount_Volume{Volume: &agentv1.PodVolume{Name: name}}
	return nil
}

// scratch names an emptyDir, or a part of one, in the guest, which makes it.
func (s *Set) scratch(m Mount) (*agentv1.Mount_Scratch, error) {
	v, err := scratch(m, s.cfg.MemoryBytes)
	if err != nil {
		return nil, err
	}
	if v.Name, err = s.volumes.Scratch(m.Volume.Dir()); err != nil {
		return nil, err
	}
	return &agentv1.Mount_Scratch{Scratch: v}, nil
}

// scratch describes an emptyDir, or a part of one, in a VM with so much memory. A limit that the kubelet put on a file system in
// memory goes along; that of a directory on the node's disk shows nowhere.
func scratch(m Mount, memory uint64) (*agentv1.ScratchVolume, error) {
	dir := m.Volume.Dir()
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, fmt.Errorf("emptyDir %s at %s: %w", dir, m.Destination, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, refused("emptyDir %s at %s is not a directory", dir, m.Destination)
	}
	// A part is the guest's to make, or has been made by a container; the kubelet has a directory of its own in its place.
	if info, err := os.Stat(m.Source); err == nil && !info.IsDir() {
		return nil, refused("%s at %s: it is a file on the host, and the guest has none of the host's emptyDirs; mount the volume",
			m.Source, m.Destination)
	}
	v := &agentv1.ScratchVolume{Path: m.Volume.Rest, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}
	return v, inMemory(v, m, st.Dev, memory)
}

// inMemory says of an emptyDir whether it is in memory, and its limit there. It is if it is a file system of its own on the host.
func inMemory(v *agentv1.ScratchVolume, m Mount, dev, memory uint64) error {
	var (
		dir    = m.Volume.Dir()
		fs     unix.Statfs_t
		parent unix.Stat_t
	)
	if err := errors.Join(unix.Statfs(dir, &fs), unix.Lstat(filepath.Dir(dir), &parent)); err != nil {
		return fmt.Errorf("emptyDir %s: %w", dir, err)
	}
	switch {
	case parent.Dev == dev:
	case fs.Type == unix.HUGETLBFS_MAGIC:
		return refused("emptyDir %s at %s: use medium Memory: it is in huge pages of the host, which a VM does not have", dir, m.Destination)
	case fs.Type == unix.TMPFS_MAGIC:
		v.Memory = true
		if size := fs.Blocks * uint64(fs.Bsize); size < memory { // else the guest could not keep it
			v.SizeBytes = size
		}
	}
	return nil
}

// imageVolume is a VOLUME of the image, for which containerd made a directory with the image's files in it. The guest has
// these in the container's root filesystem, which is as private and as short-lived, and nothing is to be mounted; where
// there are none, it makes an empty directory in its memory, which goes with the container.
func imageVolume(m Mount, g *agentv1.Mount) (*agentv1.Mount, error) {
	empty, err := emptyImageVolume(m)
	if err != nil || empty == nil {
		return nil, err
	}
	// Not a scratch volume: these stay until the pod ends, and a container that is made anew would add one each time.
	g.Source = filesystem("tmpfs")
	g.Options = append(slices.Clone(g.Options), "nosuid", "nodev",
		fmt.Sprintf("mode=%04o", empty.Mode&0o7777), fmt.Sprintf("uid=%d", empty.Uid), fmt.Sprintf("gid=%d", empty.Gid))
	return g, nil
}

// emptyImageVolume describes the directory of a VOLUME in which the image has no files; nil if it has.
func emptyImageVolume(m Mount) (*unix.Stat_t, error) {
	d, err := os.Open(m.Source)
	if err != nil {
		return nil, fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	switch {
	case errors.Is(err, io.EOF):
		var st unix.Stat_t
		if err := unix.Fstat(int(d.Fd()), &st); err != nil {
			return nil, fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
		}
		return &st, nil
	case err != nil:
		return nil, fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
	case m.ReadonlyRoot:
		return nil, refused("volume of the image at %s, in a container with a read-only root filesystem: a confidential VM has its "+
			"files in the root filesystem alone; mount an emptyDir there, or let the root filesystem be written", m.Destination)
	}
	return nil, nil
}

// terminationLog is a file with the mode and owner of the host's, and nothing in it. What the container writes to it comes back with
// its exit.
func terminationLog(m Mount) (*agentv1.FileCopy, error) {
	file, err := readFileCopy(m)
	if err != nil {
		return nil, err
	}
	file.Content, file.TerminationLog = nil, true
	return file, nil
}

// SaveTermination writes what a container said of its end to the host's file of its termination log, which is the kubelet's.
func SaveTermination(path string, message []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return fmt.Errorf("termination log: %w", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("termination log %s is not a regular file: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	if _, err := f.Write(message); err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	return nil
}

// readFileCopy reads a small file of the host.
func readFileCopy(m Mount) (*agentv1.FileCopy, error) {
	f, err := os.OpenFile(m.Source, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", m.Destination, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("mount at %s: %s is not a regular file: %w", m.Destination, m.Source, errdefs.ErrInvalidArgument)
	}
	content, err := io.ReadAll(io.LimitReader(f, wire.MaxFileCopy+1))
	if err != nil {
		return nil, err
	}
	if len(content) > wire.MaxFileCopy {
		return nil, fmt.Errorf("mount at %s: %s is larger than %d bytes: %w",
			m.Destination, m.Source, wire.MaxFileCopy, errdefs.ErrInvalidArgument)
	}
	return &agentv1.FileCopy{Content: content, Mode: st.Mode & 0o777, Uid: st.Uid, Gid: st.Gid}, nil
}
