// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

var (
	confidential = SharingOf(tee.Sample, hypervisor.ArchAMD64)
	shares       = SharingOf(tee.None, hypervisor.ArchAMD64)
)

// kubelet is a pod's directory as the kubelet lays it out.
type kubelet struct {
	t   *testing.T
	pod string
}

func newKubelet(t *testing.T) kubelet {
	return kubelet{t, filepath.Join(t.TempDir(), "pods", "0a1b2c3d-0000-4000-8000-00000000000a")}
}

// directory makes a directory of the pod.
func (k kubelet) directory(path string) string {
	dir := filepath.Join(k.pod, path)
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	return dir
}

// volume makes a volume as the AtomicWriter writes it.
func (k kubelet) volume(kind, name string, files map[string]string) string {
	dir := k.directory("volumes/kubernetes.io~" + kind + "/" + name)
	for file, content := range files {
		path := filepath.Join(dir, "..2026", file)
		require.NoError(k.t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(k.t, os.WriteFile(path, []byte(content), 0o640))
	}
	require.NoError(k.t, os.Symlink("..2026", filepath.Join(dir, "..data")))
	return dir
}

func (k kubelet) file(path, content string) string {
	path = filepath.Join(k.pod, path)
	require.NoError(k.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(k.t, os.WriteFile(path, []byte(content), 0o666))
	require.NoError(k.t, os.Chmod(path, 0o666))
	return path
}

func bind(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

// planned is the mounts of a container, after the look at the host's files.
func planned(s Sharing, all ...specs.Mount) []Mount {
	return Look(Plan(&specs.Spec{Mounts: all}, s, false), s)
}

// fakeGuest is an agent that takes volumes.
type fakeGuest struct {
	mu     sync.Mutex
	puts   []*agentv1.PutVolumeRequest
	shared []string
	fail   error
}

func (g *fakeGuest) PutVolume(_ context.Context, r *agentv1.PutVolumeRequest) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.puts = append(g.puts, r)
	return nil
}

func (g *fakeGuest) MountShared(_ context.Context, tag string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shared = append(g.shared, tag)
	return g.fail
}

// fakeVM is a VM that takes shared directories.
type fakeVM struct{ done chan struct{} }

func (v fakeVM) AddSharedDirectory(context.Context, hypervisor.SharedDirectory) error { return nil }
func (v fakeVM) Done() <-chan struct{}                                                { return v.done }

// newSet is the mounts of a pod whose goroutines end with the test, in a VM of 1 GiB.
func newSet(t *testing.T) (*Set, *fakeGuest) {
	g := &fakeGuest{}
	life, end := context.WithCancel(t.Context())
	var running sync.WaitGroup
	t.Cleanup(func() {
		end()
		running.Wait()
	})
	return New(Config{
		VM: fakeVM{make(chan struct{})}, Guest: g, MemoryBytes: 1 << 30,
		Run:     func(f func(context.Context)) { running.Go(func() { f(life) }) },
		Hotplug: time.Minute, Cleanup: time.Minute,
	}), g
}

// attach plans and makes the mounts of a container in a confidential VM.
func attach(t *testing.T, s *Set, all ...specs.Mount) ([]*agentv1.Mount, error) {
	t.Helper()
	return s.Attach(t.Context(), planned(confidential, all...), nil)
}
