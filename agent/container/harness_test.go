// SPDX-License-Identifier: Apache-2.0

package container

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
)

func TestMain(m *testing.M) {
	MaybeInit()
	code := m.Run()
	removeTestCgroups()
	os.Exit(code)
}

// busybox must be static: it is all that there is in the containers' root.
const busybox = "/usr/bin/busybox"

var applets = []string{
	"cat", "dd", "false", "grep", "head", "hostname", "id", "kill", "ls", "md5sum", "mkdir", "mknod", "mount", "nproc", "sh", "sleep", "stty",
	"tail",
	"touch", "tr", "true", "wc", "yes",
}

// testStorage gives each container a directory with busybox in it.
type testStorage struct {
	dir     string
	fail    error // of PrepareMounts
	mu      sync.Mutex
	removed []string
}

func (s *testStorage) MountRootfs(_ context.Context, id string, _ *agentv1.Rootfs, _ bool, _ idmap.Map) (string, error) {
	root := filepath.Join(s.dir, id)
	for _, d := range []string{"bin", "proc", "dev", "tmp", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return "", err
		}
	}
	in, err := os.ReadFile(busybox)
	if err != nil {
		return "", err
	}
	for _, applet := range applets {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			return "", err
		}
	}
	return root, os.WriteFile(filepath.Join(root, "bin/busybox"), in, 0o755)
}

func (s *testStorage) TerminationMessage(string) ([]byte, error) { return nil, nil }

func (s *testStorage) PrepareMounts(context.Context, string, []*agentv1.Mount) ([]specs.Mount, error) {
	if s.fail != nil {
		return nil, s.fail
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts",
			Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
	}, nil
}

func (s *testStorage) Remove(_ context.Context, id string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removed = append(s.removed, id)
	return []string{"disk-" + id}, os.RemoveAll(filepath.Join(s.dir, id))
}

// bench is a manager with a configured pod.
type bench struct {
	t       *testing.T
	m       *Manager
	streams *Streams
	storage *testStorage
	sockets string
}

// testCgroup is not the agent's own: packages are tested side by side.
func testCgroup() string { return fmt.Sprintf("/cloister-test-%d", os.Getpid()) }

// removeTestCgroups removes what is left of testCgroup, in each hierarchy.
func removeTestCgroups() {
	for _, pattern := range []string{cgroupMount, cgroupMount + "/*"} {
		left, _ := filepath.Glob(pattern + testCgroup() + "*")
		for _, dir := range left {
			_ = os.Remove(dir)
		}
	}
}

func haveCgroup2() bool {
	_, err := os.Stat(filepath.Join(cgroupMount, "cgroup.controllers"))
	return err == nil
}

func needCgroup2(t *testing.T) {
	t.Helper()
	if !haveCgroup2() {
		t.Skip("cgroup v2 with controllers is not mounted at /sys/fs/cgroup; runs in a VM, see doc.go")
	}
}

func newBench(t *testing.T, sharedPID bool) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("containers need root")
	}
	if _, err := os.Stat(busybox); err != nil {
		t.Skip("no static busybox: install busybox-static")
	}
	dir, err := os.MkdirTemp("", "cloister-container-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o711)) // the root of a user namespace must get through
	b := &bench{t: t, streams: NewStreams(), storage: &testStorage{dir: filepath.Join(dir, "roots")}, sockets: dir}
	b.m, err = NewManager(Config{StateDir: filepath.Join(dir, "state"), Storage: b.storage, Streams: b.streams, Cgroup: testCgroup()})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		b.m.mu.Lock()
		ids := make([]string, 0, len(b.m.containers))
		for id := range b.m.containers {
			ids = append(ids, id)
		}
		b.m.mu.Unlock()
		for _, id := range ids {
			_ = b.m.Signal(id, "", uint32(unix.SIGKILL), true)
			_, _ = b.m.Wait(ctx, id, "")
			_, err := b.m.Delete(ctx, id, "")
			require.NoError(t, err)
		}
		b.m.Close(ctx)
		require.NoError(t, os.RemoveAll(dir))
	})
	require.NoError(t, b.m.ConfigurePod(context.Background(), func() error { return unix.Sethostname([]byte("the-pod")) }))
	_, _, err = b.m.join(t.Context(), idmap.Map{}, sharedPID)
	if err != nil && strings.Contains(err.Error(), "linked statically") {
		t.Skip("the pause process needs a static binary, see doc.go")
	}
	require.NoError(t, err)
	return b
}

// stream is the host's end of a stdio stream.
type stream struct {
	*net.UnixConn
	id wire.StreamID
}

func (b *bench) stream() *stream {
	b.t.Helper()
	id := wire.NewStreamID()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(b.sockets, "s"), Net: "unix"})
	require.NoError(b.t, err)
	defer l.Close()
	host, err := net.Dial("unix", l.Addr().String())
	require.NoError(b.t, err)
	guest, err := l.Accept()
	require.NoError(b.t, err)
	require.NoError(b.t, b.streams.Offer(id, guest))
	b.t.Cleanup(func() { _ = host.Close() })
	return &stream{UnixConn: host.(*net.UnixConn), id: id}
}

func (s *stream) all(t *testing.T) string {
	t.Helper()
	require.NoError(t, s.SetReadDeadline(time.Now().Add(60*time.Second)))
	out, err := io.ReadAll(s)
	require.NoError(t, err)
	return string(out)
}

// until reads up to a text.
func (s *stream) until(t *testing.T, want string) string {
	t.Helper()
	require.NoError(t, s.SetReadDeadline(time.Now().Add(60*time.Second)))
	var got bytes.Buffer
	buf := make([]byte, 1)
	for !bytes.Contains(got.Bytes(), []byte(want)) {
		if _, err := s.Read(buf); err != nil {
			require.NoError(t, err, "got %q, want %q", got.String(), want)
		}
		got.Write(buf)
	}
	return got.String()
}

// script is a process that runs a shell script.
func script(text string) *specs.Process {
	return &specs.Process{Args: []string{"/bin/sh", "-c", text}, Cwd: "/", Env: []string{"PATH=/bin", "HOME=/"}}
}

func testSpec(p *specs.Process, change ...func(*specs.Spec)) *specs.Spec {
	s := &specs.Spec{
		Version: specs.Version,
		Process: p,
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"},
			{Type: specs.IPCNamespace, Path: "/proc/1/ns/ipc"}, {Type: specs.UTSNamespace, Path: "/proc/1/ns/uts"},
		}},
	}
	for _, f := range change {
		f(s)
	}
	return s
}

func ptr[T any](v T) *T { return &v }

func (b *bench) create(id string, spec *specs.Spec, stdio *agentv1.Stdio) error {
	b.t.Helper()
	raw, err := json.Marshal(spec)
	require.NoError(b.t, err)
	return b.m.Create(ctx(b.t), &agentv1.CreateContainerRequest{ContainerId: id, Spec: raw, Stdio: stdio})
}

func ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// run makes and starts a container.
func (b *bench) run(id string, spec *specs.Spec, stdio *agentv1.Stdio) {
	b.t.Helper()
	require.NoError(b.t, b.create(id, spec, stdio))
	pid, err := b.m.Start(ctx(b.t), id, "")
	require.NoError(b.t, err)
	require.NotZero(b.t, pid)
}

// exec makes and starts a further process.
func (b *bench) exec(id, execID string, p *specs.Process, stdio *agentv1.Stdio) error {
	b.t.Helper()
	raw, err := json.Marshal(p)
	require.NoError(b.t, err)
	if err := b.m.CreateProcess(ctx(b.t), &agentv1.CreateProcessRequest{ContainerId: id, ExecId: execID, Process: raw,
		Stdio: stdio}); err != nil {
		return err
	}
	_, err = b.m.Start(ctx(b.t), id, execID)
	return err
}

// pids lists the processes in a container's cgroup.
func (b *bench) pids(id string) []int {
	b.t.Helper()
	c, err := b.m.get(id)
	require.NoError(b.t, err)
	pids, err := c.lc.Processes()
	require.NoError(b.t, err)
	return pids
}

func (b *bench) wait(id, execID string) *agentv1.WaitProcessResponse {
	b.t.Helper()
	r, err := b.m.Wait(ctx(b.t), id, execID)
	require.NoError(b.t, err)
	return r
}

// remove kills and deletes a container.
func (b *bench) remove(id string) {
	b.t.Helper()
	_ = b.m.Signal(id, "", uint32(unix.SIGKILL), true)
	b.wait(id, "")
	serials, err := b.m.Delete(ctx(b.t), id, "")
	require.NoError(b.t, err)
	require.Equal(b.t, []string{"disk-" + id}, serials)
	b.gone(id)
}

// gone checks that nothing of a container is left.
func (b *bench) gone(id string) {
	b.t.Helper()
	for _, p := range []string{filepath.Join(b.m.cfg.StateDir, "containers", id), filepath.Join(b.storage.dir, id),
		filepath.Join(cgroupMount, testCgroup(), id)} {
		_, err := os.Stat(p)
		require.True(b.t, errors.Is(err, os.ErrNotExist), "%s is left (%v)", p, err)
	}
	_, err := b.m.Wait(ctx(b.t), id, "")
	require.ErrorContains(b.t, err, fmt.Sprintf("container %q: not found", id))
}
