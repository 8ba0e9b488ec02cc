// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// recordedIO counts what is done with a process's stdio.
type recordedIO struct {
	noIO
	mu               sync.Mutex
	attached, closed int
	stdout           vsock.Conn
}

func (r *recordedIO) Attach(_, stdout, _ vsock.Conn) {
	r.attached++
	r.stdout = stdout
}

func (r *recordedIO) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed++
	return nil
}

func (r *recordedIO) closes() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

func containerConfig(id string, io ProcessIO) ContainerConfig {
	return ContainerConfig{
		ID: id, Rootfs: noLayers, Stdio: Stdio{Stdout: true}, IO: io,
		Spec: &specs.Spec{
			Process: &specs.Process{Args: []string{"sh"}},
			Mounts:  []specs.Mount{{Type: "proc", Source: "proc", Destination: "/proc"}},
		},
	}
}

func TestCreateContainer(t *testing.T) {
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	io := &recordedIO{}
	c, err := p.CreateContainer(t.Context(), containerConfig("c", io))
	require.NoError(t, err)
	require.Equal(t, 1, io.attached)
	require.NotNil(t, io.stdout)
	require.Len(t, agent.created, 1)
	req := agent.created[0]
	require.Equal(t, "c", req.GetContainerId())
	require.Contains(t, string(req.GetSpec()), `"args":["sh"]`)
	require.EqualValues(t, 1<<30, req.GetRootfs().GetWritableBytes())
	require.Equal(t, "proc", req.GetMounts()[0].GetFilesystem().GetType())
	require.NotEmpty(t, req.GetStdio().GetStdout())
	require.Empty(t, req.GetStdio().GetStdin())

	again := &recordedIO{}
	_, err = p.CreateContainer(t.Context(), containerConfig("c", again))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.Equal(t, 1, again.closed)

	// The states of its process.
	require.Equal(t, ProcessCreated, c.Init().State().Status)
	require.NoError(t, c.Pause(t.Context()))
	require.Equal(t, ProcessCreated, c.Init().State().Status, "what never ran is not paused")
	require.NoError(t, c.Init().Start(t.Context()))
	require.ErrorIs(t, c.Init().Start(t.Context()), errdefs.ErrFailedPrecondition)
	require.NoError(t, c.Pause(t.Context()))
	require.Equal(t, ProcessPaused, c.Init().State().Status)
	pid := c.Init().State().PID
	require.DirExists(t, fmt.Sprintf("/proc/%d", pid))
	require.NotContains(t, []int{4711, os.Getpid()}, int(pid), "neither the VMM's nor the shim's")
	_, err = c.Delete(t.Context())
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.NoError(t, c.Resume(t.Context()))
	require.Equal(t, ProcessRunning, c.Init().State().Status)
	require.NoError(t, c.Init().Kill(t.Context(), 9, true))
	exit, err := c.Delete(waitFor(t, c))
	require.NoError(t, err)
	require.EqualValues(t, 137, exit.Status)
	require.Equal(t, pid, c.Init().State().PID)
	require.Eventually(t, func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return errors.Is(err, fs.ErrNotExist)
	}, time.Minute, time.Millisecond, "the process id is given back")
	require.Equal(t, []string{"c"}, agent.deleted)
	require.Empty(t, p.Containers())
	require.Equal(t, 1, io.closed)
}

// waitFor returns when the container's init has ended.
func waitFor(t *testing.T, c *Container) context.Context {
	t.Helper()
	_, err := c.Init().Wait(t.Context())
	require.NoError(t, err)
	return t.Context()
}

// Of a container that cannot be made nothing is left, whoever says so.
func TestCreateContainerThatFails(t *testing.T) {
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	for _, tc := range []struct {
		name   string
		change func(*ContainerConfig)
		kind   error
		want   string
	}{
		{"id", func(c *ContainerConfig) { c.ID = "../c" }, errdefs.ErrInvalidArgument, `container id "../c"`},
		{"refused", func(c *ContainerConfig) {
			c.Spec.Linux = &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/kvm"}}}
			c.Spec.Mounts = append(c.Spec.Mounts, bind("/dev/null", "/n"), bind("/srv", "/s", "rshared"))
		}, errdefs.ErrInvalidArgument, "container c: not in a VM, for 3 reasons: (1) host devices /dev/kvm"},
		{"root filesystem", func(c *ContainerConfig) { c.Rootfs = nil }, errdefs.ErrInvalidArgument, "container c: root filesystem"},
		{"mounts", func(c *ContainerConfig) { c.Spec.Mounts = append(c.Spec.Mounts, bind("/nowhere", "/n")) }, fs.ErrNotExist,
			"container c: mounts: bind mount of /nowhere at /n"},
		{"hooks", func(c *ContainerConfig) {
			c.Spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/nowhere"}}}
		}, nil, "/nowhere"},
		{"guest", func(*ContainerConfig) {
			agent.mu.Lock()
			agent.refuse = errgrpc.ToGRPC(fmt.Errorf("no such program: %w", errdefs.ErrNotFound))
			agent.mu.Unlock()
		}, errdefs.ErrNotFound, "container c: no such program"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			io := &recordedIO{}
			cfg := containerConfig("c", io)
			tc.change(&cfg)
			_, err := p.CreateContainer(t.Context(), cfg)
			require.ErrorContains(t, err, tc.want)
			if tc.kind != nil {
				require.ErrorIs(t, err, tc.kind)
			}
			require.Equal(t, 1, io.closed)
			require.Zero(t, io.attached)
			require.Empty(t, p.Containers())
		})
	}
}

// A caller that goes while the guest makes the container leaves none here.
func TestCreateContainerThatIsGivenUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	agent.creating = cancel
	_, err := p.CreateContainer(ctx, containerConfig("c", &recordedIO{}))
	require.ErrorContains(t, err, context.Canceled.Error())
	require.Empty(t, p.Containers())
	require.Equal(t, []string{"c"}, agent.deleted, "nothing of it stays in the guest")
}

// A caller who goes away while a further process is made or started changes nothing: the guest has it, and so has its owner.
func TestExecWhoseCallerIsGone(t *testing.T) {
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	c, err := p.CreateContainer(t.Context(), containerConfig("c", &recordedIO{}))
	require.NoError(t, err)
	require.NoError(t, c.Init().Start(t.Context()))
	call := func() (ctx context.Context) {
		ctx, agent.execing = context.WithCancel(t.Context())
		return ctx
	}
	x, err := c.Exec(call(), ExecConfig{ID: "x", Process: containerConfig("c", nil).Spec.Process, IO: &recordedIO{}})
	require.NoError(t, err)
	require.NoError(t, x.Start(call()))
	require.Equal(t, ProcessRunning, x.State().Status)
}

// The pod's end gives up what is under way, and waits for it.
func TestStopWhileAContainerIsMade(t *testing.T) {
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	stopped := make(chan error, 1)
	io := &recordedIO{}
	agent.creating = func() {
		go func() {
			err := p.Stop(context.Background())
			if io.closes() != 1 {
				err = errors.Join(err, errors.New("the pod has ended and the container's IO is open"))
			}
			stopped <- err
		}()
		<-p.life.Done()
	}
	_, err := p.CreateContainer(t.Context(), containerConfig("c", io))
	require.Error(t, err)
	require.NoError(t, <-stopped)
	require.Equal(t, 1, io.closed)
	require.Empty(t, p.Containers())
	_, err = p.CreateContainer(t.Context(), containerConfig("d", io))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "has been stopped")
}
