// SPDX-License-Identifier: Apache-2.0

package share

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/idmap"
)

const maxShares = 4096 // at a time

// entry is something that has a name in the served root.
type entry struct {
	*object
	name   string
	access Access
	// ids is the map by which it is shared. Other maps of one object are other objects in the guest.
	ids idmap.Map
	// fixed says that the host itself has it read-only.
	fixed bool
	users int
	// inside are entries made before it of what lies in it. It uses them while it exists, so that whoever sees them through it sees
	// what their other users see.
	inside []Inside
}

// Place is where the guest finds what was added.
type Place struct {
	// Name in the root of the filesystem, 32 hex digits; the path from there, "" for what has the name itself; and the inode number
	// that is there, by which the guest can tell that nobody has put something else in the way.
	Name, Path string
	Inode      uint64
	// Submounts are the directories in it on which others are mounted, relative, those above others first.
	Submounts []string
	// Inside are parts of it that have names of their own. The guest has to mount them on the part, so that it is one object,
	// however it is reached. Those above others first.
	Inside []Inside
}

// Inside is a part of a Place that has a name of its own.
type Inside struct {
	// Path in the Place, relative.
	Path string
	// Place of the part; it has none inside.
	Place Place
}

// Add shares a directory or regular file of the host, with what is mounted below. It appears below the root of the filesystem, at
// once. What is shared already, under whatever path, alone or as a part of something, has the place that it has, so that it is one
// object in the guest; see the package comment for what is not. Links in hostPath are followed. A path that the host replaces later
// (by a rename over it) stays what it was. With ids, the map of a user namespace of the guest's, what belongs to root on the host
// belongs to the root of that namespace in the guest, and the other way round; mounts below stay as they are.
//
// Errors: errdefs.ErrNotFound if the path does not exist, errdefs.ErrNotImplemented for sockets and devices, and for ids where the
// file system has no such mounts, errdefs.ErrUnavailable if virtiofsd has ended.
func (s *Share) Add(ctx context.Context, hostPath string, access Access, ids idmap.Map) (Place, error) {
	if !filepath.IsAbs(hostPath) {
		return Place{}, fmt.Errorf("share %q: not an absolute path: %w", hostPath, errdefs.ErrInvalidArgument)
	}
	if err := s.Err(); err != nil {
		return Place{}, fmt.Errorf("share %s: %w", hostPath, err)
	}
	place, err := s.add(ctx, hostPath, access, ids)
	if err != nil {
		return Place{}, fmt.Errorf("share %s: %w", hostPath, err)
	}
	return place, nil
}

func (s *Share) add(ctx context.Context, hostPath string, access Access, ids idmap.Map) (Place, error) {
	fd, err := open(hostPath)
	if err != nil {
		return Place{}, err
	}
	defer unix.Close(fd)
	o, err := look(fd)
	if err != nil {
		return Place{}, err
	}
	if access == RecursiveReadOnly && len(o.submounts) == 0 {
		access = ReadOnly
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return Place{}, err
	}
	tree, err := cloneTree(fd, access)
	if err != nil {
		return Place{}, err
	}
	defer unix.Close(tree) // removes the copy unless it is attached
	if err := mapIDs(tree, ids); err != nil {
		return Place{}, err
	}
	wanted := &entry{object: &o, access: access, ids: ids, fixed: fs.Flags&unix.ST_RDONLY != 0}
	var place Place
	err = s.ns.do(ctx, func() (err error) {
		place, err = s.place(tree, wanted)
		return err
	})
	return place, err
}

// place finds what is there already or attaches the tree. It runs on the namespace's thread, as all that uses the entries does.
func (s *Share) place(tree int, wanted *entry) (Place, error) {
	e, path, err := s.find(wanted)
	if err == nil && e == nil {
		e, err = wanted, s.attach(tree, wanted)
	}
	if err != nil {
		return Place{}, err
	}
	e.users++
	p := Place{Name: e.name, Path: path, Inode: wanted.inode, Submounts: wanted.submountPaths()}
	for _, in := range e.inside {
		if rest, ok := below("/"+path, "/"+in.Path); ok && rest != "" {
			p.Inside = append(p.Inside, Inside{Path: rest, Place: in.Place})
		}
	}
	return p, nil
}

// find returns the entry that is or has what is wanted, with its path there; nil if there is none.
func (s *Share) find(wanted *entry) (*entry, string, error) {
	var (
		found *entry
		path  string
	)
	for _, e := range s.entries {
		if e.ids != wanted.ids {
			continue
		}
		if e.same(wanted.object) {
			if ok, err := s.allow(e, wanted.access); ok || err != nil {
				return e, "", err
			}
			continue
		}
		if !e.allows(wanted.access) {
			continue
		}
		for _, candidate := range wanted.within(e.object) {
			// Of several the innermost: it is older than those around it, or it would be a part of them, and mounted in them.
			if (found == nil || len(candidate) < len(path)) && wanted.foundAt(s.ns.served, e.name+"/"+candidate) {
				found, path = e, candidate
			}
		}
	}
	return found, path, nil
}

// attach gives what is wanted a name.
func (s *Share) attach(tree int, wanted *entry) error {
	if len(s.entries) >= maxShares {
		return fmt.Errorf("%d directories are shared already: %w", maxShares, errdefs.ErrResourceExhausted)
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	wanted.name = hex.EncodeToString(id[:])
	if err := s.ns.attach(tree, wanted.name, wanted.isDir); err != nil {
		return err
	}
	s.entries[wanted.name] = wanted
	for _, e := range s.entries {
		if e.ids != wanted.ids {
			continue
		}
		for _, path := range e.within(wanted.object) {
			if !e.foundAt(s.ns.served, wanted.name+"/"+path) {
				continue
			}
			ok, err := s.allow(e, wanted.access)
			if err != nil {
				wanted.users = 1
				return errors.Join(err, s.release(wanted.name))
			}
			if ok {
				e.users++
				wanted.inside = append(wanted.inside, Inside{Path: path, Place: Place{Name: e.name, Inode: e.inode, Submounts: e.submountPaths()}})
			}
		}
	}
	slices.SortFunc(wanted.inside, func(a, b Inside) int { return cmp.Compare(a.Path, b.Path) })
	return nil
}

// allows reports whether an entry gives the guest as much as is asked for. What it gives beyond that, the guest has to withhold.
func (e *entry) allows(access Access) bool {
	return e.access <= access || e.fixed && access == Writable && e.access == ReadOnly
}

// allow makes an entry give as much as is asked for, and reports whether it does. One that is recursively read-only stays so: which
// of its mounts were read-only before is not known any more.
func (s *Share) allow(e *entry, access Access) (bool, error) {
	if e.allows(access) {
		return true, nil
	}
	if e.access != ReadOnly {
		return false, nil
	}
	if err := s.makeWritable(e.name); err != nil {
		return false, fmt.Errorf("make what is shared read-only writable: %w", err)
	}
	e.access = Writable
	return true, nil
}

// Remove ends one use of a Place; with the last one of a name its sharing ends. Files that the guest has open stay open until it
// closes them.
func (s *Share) Remove(ctx context.Context, p Place) error {
	if err := s.ns.do(ctx, func() error { return s.release(p.Name) }); err != nil {
		return fmt.Errorf("end share %s: %w", p.Name, err)
	}
	return nil
}

func (s *Share) release(name string) error {
	e := s.entries[name]
	if e == nil {
		return errdefs.ErrNotFound
	}
	if e.users > 1 {
		e.users--
		return nil
	}
	if err := s.ns.detach(name, e.isDir); err != nil {
		return err
	}
	delete(s.entries, name)
	var failed error
	for _, in := range e.inside {
		failed = cmp.Or(failed, s.release(in.Place.Name))
	}
	return failed
}
