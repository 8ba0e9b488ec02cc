// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/fsnotify/fsnotify"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// PutFunc sends one request to the guest.
type PutFunc func(ctx context.Context, req *agentv1.PutVolumeRequest) error

// Set is a pod's volumes in its guest.
type Set struct {
	put PutFunc
	// run starts a goroutine that ends with the context that it is given, and that somebody waits for.
	run func(func(context.Context))

	mu    sync.Mutex
	byKey map[string]*volume
	names map[string]bool
	// watcher is made with the first volume that is followed; its goroutine closes it.
	watcher *fsnotify.Watcher
	// retry is how long after a change did not reach the guest it is tried again; tests have less.
	retry time.Duration
}

// retryTime leaves a guest that has no memory, or no time, some of it. The kubelet writes a volume anew only when it
// changes again, which may be never.
const retryTime = time.Minute

// volume is one directory, and what the guest has of it.
type volume struct {
	name, dir string
	// turn is held (one element) while the volume is read and pushed. What follows is read and written under it.
	turn       chan struct{}
	generation uint64
	// pushed is what the guest has, without the contents: they can be secrets, and many.
	pushed  *Snapshot
	watched bool
	// stale: a change did not reach the guest, and may if it is tried again.
	stale bool
}

// NewSet makes an empty set. run starts the goroutine that watches the volumes; whoever gives it ends it.
func NewSet(put PutFunc, run func(func(context.Context))) *Set {
	return &Set{put: put, run: run, byKey: map[string]*volume{}, names: map[string]bool{}, retry: retryTime}
}

// Mount brings a volume into the guest, unless it is there, and keeps it up to date from then on. It returns the volume's
// name in the guest and what the guest has of it, without the contents.
func (s *Set) Mount(ctx context.Context, dir string) (string, *Snapshot, error) {
	return s.mount(ctx, dir, filepath.Base(dir), true)
}

// MountOnce is Mount for a directory that the guest gets as it is now: a part of a volume, for one container. One that is
// made anew finds its directory as the kubelet mounted it for that one.
func (s *Set) MountOnce(ctx context.Context, dir string) (string, *Snapshot, error) {
	return s.mount(ctx, dir, "", false)
}

func (s *Set) mount(ctx context.Context, dir, base string, watch bool) (string, *Snapshot, error) {
	v, err := s.volume("copied:"+dir, dir, base)
	if err != nil {
		return "", nil, err
	}
	if err := v.take(ctx); err != nil {
		return "", nil, err
	}
	defer v.leave()
	if watch && !v.watched {
		// First the watch, then the files: what changes between the two is seen twice rather than never.
		if err := s.watch(v); err != nil {
			return "", nil, err
		}
		v.watched = true
	}
	if v.pushed == nil || !watch {
		if err := s.push(ctx, v); err != nil {
			return "", nil, err
		}
	}
	return v.name, v.pushed, nil
}

// Scratch returns the guest's name of an emptyDir.
func (s *Set) Scratch(dir string) (string, error) {
	v, err := s.volume("scratch:"+dir, dir, filepath.Base(dir))
	if err != nil {
		return "", err
	}
	return v.name, nil
}

// volume finds or makes the entry of a directory.
func (s *Set) volume(key, dir, base string) (*volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.byKey[key]; ok {
		return v, nil
	}
	if len(s.byKey) >= wire.MaxVolumes {
		return nil, fmt.Errorf("the pod has more than %d volumes: %w", wire.MaxVolumes, errdefs.ErrResourceExhausted)
	}
	if !validName(base) || s.names[base] {
		sum := sha256.Sum256([]byte(key))
		base = "v-" + hex.EncodeToString(sum[:16])
	}
	v := &volume{name: base, dir: dir, turn: make(chan struct{}, 1)}
	s.byKey[key], s.names[base] = v, true
	return v, nil
}

// validName reports whether a volume can have the name in the guest (agentv1.PutVolumeRequest.name).
func validName(s string) bool {
	return len(s) > 0 && len(s) <= 64 && s[0] != '.' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-") == ""
}

func (v *volume) take(ctx context.Context) error {
	select {
	case v.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (v *volume) leave() { <-v.turn }

// push reads the volume and sends it as a new generation, if it is another than the guest has. The caller holds the turn.
func (s *Set) push(ctx context.Context, v *volume) error {
	snapshot, err := Read(ctx, v.dir)
	v.stale = errdefs.IsUnavailable(err)
	if err != nil {
		return err
	}
	if v.pushed != nil && snapshot.Version != "" && snapshot.Version == v.pushed.Version {
		return nil
	}
	// A generation that fails half-way is dropped by the next one, which needs a number of its own.
	v.generation++
	for _, req := range requests(v.name, v.generation, snapshot.Files) {
		if err := s.put(ctx, req); err != nil {
			v.stale = true
			return fmt.Errorf("copy volume %s to the guest: %w", v.dir, err)
		}
	}
	for i := range snapshot.Files {
		snapshot.Files[i].Content = nil
	}
	v.pushed = snapshot
	return nil
}

// requests cuts the files into messages of bounded size; the last one commits.
func requests(name string, generation uint64, files []File) []*agentv1.PutVolumeRequest {
	var all []*agentv1.PutVolumeRequest
	next := func() *agentv1.PutVolumeRequest {
		r := &agentv1.PutVolumeRequest{Name: name, Generation: generation}
		all = append(all, r)
		return r
	}
	r, room := next(), wire.MaxVolumeChunk
	for _, f := range files {
		for offset := 0; offset == 0 || offset < len(f.Content); {
			if room == 0 {
				r, room = next(), wire.MaxVolumeChunk
			}
			n := min(len(f.Content)-offset, room)
			part := &agentv1.VolumeFile{Path: f.Path, Offset: uint64(offset), Content: f.Content[offset : offset+n]}
			if offset == 0 {
				part.Mode, part.Uid, part.Gid = f.Mode, f.UID, f.GID
			}
			r.Files = append(r.Files, part)
			room -= n
			if offset += n; n == 0 {
				break
			}
		}
	}
	r.Commit = true
	return all
}

// watch adds the volume's directory to the pod's watch, which begins with the first one.
func (s *Set) watch(v *volume) error {
	w, err := s.watching()
	if err != nil {
		return err
	}
	if err := w.Add(v.dir); err != nil {
		return fmt.Errorf("watch volume %s for changes: %w", v.dir, err)
	}
	return nil
}

func (s *Set) watching() (*fsnotify.Watcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watcher != nil {
		return s.watcher, nil
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch the pod's volumes (are there more pods than fs.inotify.max_user_instances allows?): %w", err)
	}
	s.watcher = w
	s.run(func(ctx context.Context) { s.follow(ctx, w) })
	return w, nil
}

// follow pushes what the kubelet changes until ctx ends. A failure is logged, and tried again after some time or with the
// next change.
func (s *Set) follow(ctx context.Context, w *fsnotify.Watcher) {
	defer w.Close()
	again := time.NewTimer(s.retry)
	defer again.Stop()
	again.Stop()
	refresh := func(dir string, stale bool) {
		if s.refresh(ctx, dir, stale) {
			again.Reset(s.retry)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			// The rename of the link comes as the creation of its new name.
			if filepath.Base(e.Name) == dataLink && e.Has(fsnotify.Create) {
				refresh(filepath.Dir(e.Name), false)
			}
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			// Events were lost: look at everything.
			log.G(ctx).WithError(err).Warn("watch of the pod's volumes")
			refresh("", false)
		case <-again.C:
			refresh("", true)
		}
	}
}

// refresh pushes the volume with the directory dir, or all that are followed if it is empty; with stale only what failed
// before. It reports whether something is to be tried again.
func (s *Set) refresh(ctx context.Context, dir string, stale bool) (again bool) {
	s.mu.Lock()
	var all []*volume
	for _, v := range s.byKey {
		if dir == "" || v.dir == dir {
			all = append(all, v)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *volume) int { return strings.Compare(a.name, b.name) })
	for _, v := range all {
		if v.take(ctx) != nil {
			return false
		}
		if v.watched && v.pushed != nil && (v.stale || !stale) {
			if err := s.push(ctx, v); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).WithField("volume", v.name).WithField("again", v.stale).Warn("a change of a volume does not reach the guest")
			}
			again = again || v.stale
		}
		v.leave()
	}
	return again
}
