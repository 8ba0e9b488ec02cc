// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// The layout of a volume's directory is that of the kubelet's AtomicWriter (Kubernetes, pkg/volume/util/atomic_writer.go),
// which programs that watch their configuration know:
//
//	..2026_01_02_03_04_05.000000000-7/key   the files of a generation
//	..data -> ..2026_01_02_03_04_05.000000000-7
//	key -> ..data/key
const (
	dataLink    = "..data"
	newDataLink = "..data_tmp"
	newLink     = "..new_"
)

// volume is a copied volume. Whoever holds turn may use the rest.
type volume struct {
	turn chan struct{}
	dir  string
	// last is the greatest generation that was begun; data the directory of the committed one, empty before the first.
	last uint64
	data string
	// names are the links that the containers see.
	names map[string]bool
	// pending is the generation that is being put.
	pending *pendingGeneration
}

type pendingGeneration struct {
	manifest  *manifest
	directory string // name in the volume's directory
}

// PutVolume adds files to the next generation of a volume, and shows it with the last request of the generation. Any
// fault drops what was put of that generation.
func (s *Store) PutVolume(ctx context.Context, r *agentv1.PutVolumeRequest) error {
	if err := checkPut(r); err != nil {
		return err
	}
	v, err := s.volume(r.GetName())
	if err != nil {
		return err
	}
	if err := v.take(ctx); err != nil {
		return fmt.Errorf("wait for another operation on volume %s: %w", r.GetName(), err)
	}
	defer v.leave()
	err = v.begin(r.GetGeneration())
	if err == nil {
		if err = v.put(r.GetFiles()); err == nil && r.GetCommit() {
			err = v.commit()
		}
		if err != nil {
			err = errors.Join(err, v.drop())
		}
	}
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("the guest's memory for files is full: %w (%w)", err, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return fmt.Errorf("volume %s, generation %d: %w", r.GetName(), r.GetGeneration(), err)
	}
	return nil
}

// volume finds or makes the entry of a volume.
func (s *Store) volume(name string) (*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[name]
	if v == nil {
		if len(s.volumes) >= wire.MaxVolumes {
			return nil, fmt.Errorf("there are %d volumes, the limit: %w", wire.MaxVolumes, errdefs.ErrResourceExhausted)
		}
		s.names++
		v = &volume{turn: make(chan struct{}, 1), dir: filepath.Join(s.root, "volumes", fmt.Sprint(s.names)), names: map[string]bool{}}
		s.volumes[name] = v
	}
	return v, nil
}

func (v *volume) take(ctx context.Context) error {
	select {
	case v.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (v *volume) leave() { <-v.turn }

// begin makes the generation the one that is put, or finds that it is.
func (v *volume) begin(generation uint64) error {
	switch {
	case generation < v.last:
		return fmt.Errorf("it comes after generation %d: %w", v.last, errdefs.ErrFailedPrecondition)
	case generation == v.last && v.pending == nil:
		return fmt.Errorf("it was committed, or dropped for a fault: %w", errdefs.ErrFailedPrecondition)
	case generation == v.last:
		return nil
	}
	v.last = generation
	if err := v.drop(); err != nil {
		return err
	}
	if err := os.Mkdir(v.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make its directory: %w", err)
	}
	// The number keeps two of one moment apart: the clock is the host's.
	directory := time.Now().UTC().Format("..2006_01_02_15_04_05.000000000-") + fmt.Sprint(generation)
	if err := os.Mkdir(filepath.Join(v.dir, directory), 0o755); err != nil {
		return fmt.Errorf("make the generation's directory: %w", err)
	}
	v.pending = &pendingGeneration{manifest: newManifest(), directory: directory}
	return nil
}

// drop deletes what was put of the pending generation.
func (v *volume) drop() error {
	if v.pending == nil {
		return nil
	}
	directory := v.pending.directory
	v.pending = nil
	if err := os.RemoveAll(filepath.Join(v.dir, directory)); err != nil {
		return fmt.Errorf("delete an unfinished generation: %w", err)
	}
	return nil
}

// beneath opens a path below a directory, following no link and leaving no mount.
func beneath(dir int, p string, flags int, mode uint64) (int, error) {
	return unix.Openat2(dir, p, &unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC, Mode: mode,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// openDirectory opens a directory in the volume's directory.
func (v *volume) openDirectory(name string) (int, error) {
	top, err := unix.Open(v.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(top)
	return beneath(top, name, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// put writes parts of files into the pending generation.
func (v *volume) put(files []*agentv1.VolumeFile) error {
	dir, err := v.openDirectory(v.pending.directory)
	if err != nil {
		return fmt.Errorf("open the generation's directory: %w", err)
	}
	defer unix.Close(dir)
	for _, f := range files {
		begins, err := v.pending.manifest.add(f)
		if err != nil {
			return err
		}
		if err := writePart(dir, f, begins); err != nil {
			return fmt.Errorf("write %q: %w", f.GetPath(), err)
		}
	}
	return nil
}

func writePart(dir int, f *agentv1.VolumeFile, begins bool) (err error) {
	flags := unix.O_WRONLY | unix.O_NONBLOCK // a container that may mount could have put a pipe there
	if begins {
		flags |= unix.O_CREAT | unix.O_EXCL
		if err := mkdirs(dir, path.Dir(f.GetPath())); err != nil {
			return err
		}
	}
	var mode uint64
	if begins {
		mode = 0o600
	}
	fd, err := beneath(dir, f.GetPath(), flags, mode)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), f.GetPath())
	defer func() { err = errors.Join(err, file.Close()) }()
	if _, err := file.WriteAt(f.GetContent(), int64(f.GetOffset())); err != nil {
		return err
	}
	if !begins {
		return nil
	}
	return setOwner(fd, f.GetUid(), f.GetGid(), f.GetMode()&0o777)
}

func setOwner(fd int, uid, gid, mode uint32) error {
	// The owner first: a change of owner may take mode bits away.
	if err := unix.Fchown(fd, int(uid), int(gid)); err != nil {
		return fmt.Errorf("give it to %d:%d: %w", uid, gid, err)
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return fmt.Errorf("set mode %#o: %w", mode, err)
	}
	return nil
}

// mkdirs makes a clean relative path of directories below dir.
func mkdirs(dir int, p string) error {
	if p == "." {
		return nil
	}
	if err := mkdirs(dir, path.Dir(p)); err != nil {
		return err
	}
	parent, err := beneath(dir, path.Dir(p), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, path.Base(p), 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// commit shows the pending generation: with one rename all files change at once. Whatever can fail for want of memory is
// made before it, under names that nobody looks at; after it things are only renamed and deleted.
func (v *volume) commit() (err error) {
	top, err := os.OpenRoot(v.dir)
	if err != nil {
		return err
	}
	defer top.Close()
	names := v.pending.manifest.topNames()
	links := map[string]string{newDataLink: v.pending.directory} // targets
	shown := map[string]string{}                                 // names by those of links
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !v.names[name] {
			hidden := newLink + fmt.Sprint(len(links))
			links[hidden], shown[hidden] = path.Join(dataLink, name), name
		}
	}
	for name, target := range links {
		err := top.Remove(name)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			err = top.Symlink(target, name)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("make a link: %w", err), removeAll(top, maps.Keys(links)))
		}
	}
	if err := top.Rename(newDataLink, dataLink); err != nil {
		return errors.Join(fmt.Errorf("show the generation: %w", err), removeAll(top, maps.Keys(links)))
	}
	old := v.data
	v.data, v.pending = v.pending.directory, nil
	for hidden, name := range shown {
		if renameErr := top.Rename(hidden, name); renameErr != nil {
			err = errors.Join(err, fmt.Errorf("show a name: %w", renameErr))
			continue
		}
		v.names[name] = true
	}
	for name := range v.names {
		if !names[name] {
			err = errors.Join(err, removeAll(top, slices.Values([]string{name})))
			delete(v.names, name)
		}
	}
	if old != "" {
		// Whoever has a file of it open keeps that file.
		err = errors.Join(err, top.RemoveAll(old))
	}
	return err
}

// removeAll removes links that are there.
func removeAll(top *os.Root, names iter.Seq[string]) (err error) {
	for name := range names {
		if removeErr := top.Remove(name); !errors.Is(removeErr, os.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

// bindVolume returns the place of a volume, or of a copy of one of its files.
func (s *Store) bindVolume(ctx context.Context, c *container, index int, m *agentv1.PodVolume) (string, error) {
	s.mu.Lock()
	v := s.volumes[m.GetName()]
	s.mu.Unlock()
	if v == nil {
		return "", fmt.Errorf("volume %.80q is not there, PutVolume brings it: %w", m.GetName(), errdefs.ErrFailedPrecondition)
	}
	if err := v.take(ctx); err != nil {
		return "", fmt.Errorf("wait for another operation on volume %s: %w", m.GetName(), err)
	}
	defer v.leave()
	if v.data == "" {
		return "", fmt.Errorf("volume %s has no complete generation yet: %w", m.GetName(), errdefs.ErrFailedPrecondition)
	}
	if m.GetPath() == "" {
		return v.dir, nil
	}
	dir, err := v.openDirectory(v.data)
	if err != nil {
		return "", fmt.Errorf("open volume %s: %w", m.GetName(), err)
	}
	defer unix.Close(dir)
	fd, err := beneath(dir, m.GetPath(), unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return "", fmt.Errorf("volume %s has no file %q: %w", m.GetName(), m.GetPath(), errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("open %q in volume %s: %w", m.GetPath(), m.GetName(), err)
	}
	file := os.NewFile(uintptr(fd), m.GetPath())
	defer file.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return "", err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Size > wire.MaxVolumeBytes {
		return "", fmt.Errorf("%q in volume %s is not a file: %w", m.GetPath(), m.GetName(), errdefs.ErrInvalidArgument)
	}
	content := make([]byte, stat.Size)
	if n, err := file.ReadAt(content, 0); n != len(content) {
		return "", fmt.Errorf("read %q in volume %s: %w", m.GetPath(), m.GetName(), err)
	}
	return s.copyFile(c, index, &agentv1.FileCopy{Content: content, Mode: stat.Mode & 0o777, Uid: stat.Uid, Gid: stat.Gid})
}

// harmless returns a bind mount's options with which neither devices nor set-user-ID bits work in it.
func harmless(options []string) []string {
	options = slices.DeleteFunc(options, func(o string) bool { return slices.Contains([]string{"suid", "rsuid", "dev", "rdev"}, o) })
	return append(options, "nosuid", "nodev")
}

// readOnly returns a bind mount's options with which it can only be read, too.
func readOnly(options []string) []string {
	options = slices.DeleteFunc(options, func(o string) bool { return o == "rw" || o == "rrw" })
	return harmless(append(options, "ro"))
}
