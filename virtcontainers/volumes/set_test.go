// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// fakeGuest puts volumes together as the protocol says and complains about what breaks it.
type fakeGuest struct {
	t *testing.T

	mu       sync.Mutex
	open     map[string]*generation
	shown    map[string]map[string]string
	commits  int
	requests int
	fail     error
	// failing is how many requests are still to fail.
	failing int
	// changed gets a volume's name with each commit.
	changed chan string
}

type generation struct {
	number uint64
	files  map[string][]byte
}

func newFakeGuest(t *testing.T) *fakeGuest {
	return &fakeGuest{t: t, open: map[string]*generation{}, shown: map[string]map[string]string{}, changed: make(chan string, 64)}
}

func (g *fakeGuest) put(_ context.Context, r *agentv1.PutVolumeRequest) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.requests++
	if g.fail != nil {
		return g.fail
	}
	if g.failing > 0 {
		g.failing--
		return errors.New("the guest has no memory")
	}
	now := g.open[r.GetName()]
	if now == nil || r.GetGeneration() > now.number {
		now = &generation{number: r.GetGeneration(), files: map[string][]byte{}}
		g.open[r.GetName()] = now
	} else if r.GetGeneration() < now.number || now.files == nil {
		g.t.Errorf("generation %d after %d", r.GetGeneration(), now.number)
	}
	sum := 0
	for _, f := range r.GetFiles() {
		have, began := now.files[f.GetPath()]
		if began == (f.GetOffset() == 0) || uint64(len(have)) != f.GetOffset() {
			g.t.Errorf("%s: part at %d of %d, begun %v", f.GetPath(), f.GetOffset(), len(have), began)
		}
		if began && f.GetMode()+f.GetUid()+f.GetGid() != 0 {
			g.t.Errorf("%s: mode or owner on a further part", f.GetPath())
		}
		now.files[f.GetPath()] = append(have, f.GetContent()...)
		if now.files[f.GetPath()] == nil {
			now.files[f.GetPath()] = []byte{}
		}
		sum += len(f.GetContent())
	}
	if sum > wire.MaxVolumeChunk {
		g.t.Errorf("%d bytes in one request", sum)
	}
	if r.GetCommit() {
		shown := map[string]string{}
		for path, content := range now.files {
			shown[path] = string(content)
		}
		g.shown[r.GetName()], now.files = shown, nil
		g.commits++
		g.changed <- r.GetName()
	}
	return nil
}

func (g *fakeGuest) files(name string) map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shown[name]
}

func (g *fakeGuest) setFail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fail = err
}

// newSet makes a set whose goroutines end with the test, and checks that they do.
func newSet(t *testing.T, g *fakeGuest) *Set {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	return NewSet(g.put, func(f func(context.Context)) { running.Go(func() { f(ctx) }) })
}

func awaitChange(t *testing.T, g *fakeGuest) string {
	t.Helper()
	select {
	case name := <-g.changed:
		return name
	case <-time.After(30 * time.Second):
		t.Fatal("no change reached the guest")
		return ""
	}
}

func TestSetFollowsUpdates(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v, w := newAtomicVolume(t, map[string]string{"a": "1", "d/b": "2"}), newAtomicVolume(t, map[string]string{"x": "y"})
	name, snapshot, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	require.Equal(t, "volume", name)
	require.Len(t, snapshot.Files, 2)
	require.Equal(t, map[string]string{"a": "1", "d/b": "2"}, g.files(name))
	awaitChange(t, g)
	again, _, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	require.Equal(t, name, again)
	other, _, err := s.Mount(t.Context(), w.dir)
	require.NoError(t, err)
	require.NotEqual(t, name, other, "two directories with one name")
	require.True(t, validName(other))
	require.Equal(t, other, awaitChange(t, g))
	require.Equal(t, 2, g.commits, "a volume that two containers mount is copied once")

	v.update(map[string]string{"a": "new"})
	require.Equal(t, name, awaitChange(t, g))
	require.Equal(t, map[string]string{"a": "new"}, g.files(name))
	require.Equal(t, map[string]string{"x": "y"}, g.files(other))
	v.update(map[string]string{})
	awaitChange(t, g)
	require.Empty(t, g.files(name))
}

func TestSetTriesAgainWithTheNextUpdate(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	g.setFail(errors.New("the guest is busy"))
	_, _, err := s.Mount(t.Context(), v.dir)
	require.ErrorContains(t, err, "the guest is busy")
	g.setFail(nil)
	name, _, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	awaitChange(t, g)

	// A change that cannot be copied leaves the old files; the next one arrives.
	v.update(map[string]string{"a": strings.Repeat("x", wire.MaxVolumeBytes+1)})
	v.update(map[string]string{"a": "3"})
	for g.files(name)["a"] != "3" {
		awaitChange(t, g)
	}
}

// A volume that is not changed again must not stay as it was for ever.
func TestSetTriesAgainByItself(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	s.retry = time.Millisecond
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	name, _, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	awaitChange(t, g)
	g.mu.Lock()
	g.failing = 3
	g.mu.Unlock()
	v.update(map[string]string{"a": "2"})
	awaitChange(t, g)
	require.Equal(t, map[string]string{"a": "2"}, g.files(name))
}

// The shim does not keep the pod's secrets, nor as much memory as they have.
func TestSetKeepsNoContents(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v := newAtomicVolume(t, map[string]string{"a": "secret"})
	_, snapshot, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	require.Len(t, snapshot.Files, 1)
	require.Equal(t, "a", snapshot.Files[0].Path)
	require.Nil(t, snapshot.Files[0].Content)
}

// The container that is made anew has a part of the volume as it is then.
func TestSetReadsAPartAnew(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	dir := t.TempDir()
	for _, content := range []string{"1", "2"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), []byte(content), 0o600))
		name, _, err := s.MountOnce(t.Context(), dir)
		require.NoError(t, err)
		require.Equal(t, map[string]string{"a": content}, g.files(name))
	}
}

func TestSetKeepsWhatIsNotFollowed(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	name, _, err := s.MountOnce(t.Context(), v.dir)
	require.NoError(t, err)
	require.True(t, validName(name))
	s.mu.Lock()
	defer s.mu.Unlock()
	require.Nil(t, s.watcher, "nothing to watch")
}

func TestSetFollowsNoMoreAtItsEnd(t *testing.T) {
	g := newFakeGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	s := NewSet(g.put, func(f func(context.Context)) { running.Go(func() { f(ctx) }) })
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	_, _, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	cancel()
	running.Wait()
	v.update(map[string]string{"a": "2"})
	require.Equal(t, 1, g.commits)
	_, _, err = s.Mount(t.Context(), newAtomicVolume(t, nil).dir)
	require.Error(t, err, "the pod has ended")
}

func TestSetLimits(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	names := map[string]bool{}
	for i := range wire.MaxVolumes {
		name, err := s.Scratch(fmt.Sprintf("/pods/%d/Scratch", i))
		require.NoError(t, err)
		require.True(t, validName(name), name)
		names[name] = true
	}
	require.Len(t, names, wire.MaxVolumes)
	_, err := s.Scratch("/pods/0/Scratch")
	require.NoError(t, err, "one that is there already")
	_, err = s.Scratch("/one-more")
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	_, _, err = s.Mount(t.Context(), newAtomicVolume(t, nil).dir)
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
}

func TestSetMountEndsWithTheContext(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v := newAtomicVolume(t, nil)
	one, err := s.volume("copied:"+v.dir, v.dir, "volume")
	require.NoError(t, err)
	require.NoError(t, one.take(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = s.Mount(ctx, v.dir)
	require.ErrorIs(t, err, context.Canceled)
	one.leave()
}

func TestRequests(t *testing.T) {
	big := strings.Repeat("x", wire.MaxVolumeChunk)
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  int
	}{
		{"no files", nil, 1},
		{"empty files", map[string]string{"a": "", "b": ""}, 1},
		{"one that just fits", map[string]string{"a": big}, 1},
		{"one byte more", map[string]string{"a": big + "y"}, 2},
		{"a full one and an empty one", map[string]string{"a": big, "b": ""}, 2},
		{"several", map[string]string{"a": "1", "b": big + big, "c": "3"}, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newFakeGuest(t)
			s := newSet(t, g)
			v := newAtomicVolume(t, tc.files)
			name, _, err := s.Mount(t.Context(), v.dir)
			require.NoError(t, err)
			if tc.files == nil {
				tc.files = map[string]string{}
			}
			require.Equal(t, tc.files, g.files(name))
			require.Equal(t, tc.want, g.requests)
		})
	}
}

func TestValidName(t *testing.T) {
	for _, good := range []string{"a", "0", "my-config.v1", strings.Repeat("a", 64)} {
		require.True(t, validName(good), good)
	}
	for _, bad := range []string{"", ".a", "A", "a_b", "a/b", strings.Repeat("a", 65), "é"} {
		require.False(t, validName(bad), bad)
	}
}

func TestVolumeThatIsRemovedIsForgottenQuietly(t *testing.T) {
	g := newFakeGuest(t)
	s := newSet(t, g)
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	name, _, err := s.Mount(t.Context(), v.dir)
	require.NoError(t, err)
	require.NoError(t, os.RemoveAll(v.dir))
	w := newAtomicVolume(t, map[string]string{"b": "1"})
	other, _, err := s.Mount(t.Context(), w.dir)
	require.NoError(t, err)
	w.update(map[string]string{"b": "2"})
	for g.files(other)["b"] != "2" {
		awaitChange(t, g)
	}
	require.Equal(t, map[string]string{"a": "1"}, g.files(name), "the guest keeps what it has")
	require.NoDirExists(t, filepath.Join(v.dir, dataLink))
}
