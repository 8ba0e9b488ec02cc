// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// scriptedAgent answers what the tests of one container need; a call that it does not know panics.
type scriptedAgent struct {
	agentv1.AgentService

	// start, where set, is the answer to StartProcess.
	start error

	mu    sync.Mutex
	exits map[string]chan uint32
	calls []string
}

func (a *scriptedAgent) note(call string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, call)
}

// exit is where a test tells the status of a process.
func (a *scriptedAgent) exit(execID string) chan uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.exits == nil {
		a.exits = map[string]chan uint32{}
	}
	if a.exits[execID] == nil {
		a.exits[execID] = make(chan uint32, 1)
	}
	return a.exits[execID]
}

func (a *scriptedAgent) StartProcess(context.Context, *agentv1.StartProcessRequest) (*agentv1.StartProcessResponse, error) {
	a.note("start")
	return &agentv1.StartProcessResponse{}, a.start
}

func (a *scriptedAgent) WaitProcess(ctx context.Context, r *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	select {
	case status := <-a.exit(r.GetExecId()):
		return &agentv1.WaitProcessResponse{ExitStatus: status}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (a *scriptedAgent) DeleteProcess(_ context.Context, r *agentv1.DeleteProcessRequest) (*agentv1.DeleteProcessResponse, error) {
	a.note("delete")
	return &agentv1.DeleteProcessResponse{}, nil
}

func (a *scriptedAgent) Shutdown(context.Context, *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	return &agentv1.ShutdownResponse{}, nil
}

// fakeContainer is a container in a pod that is ready, with an agent of the test's. Its init has been created.
func fakeContainer(t *testing.T, agent agentv1.AgentService, spec *specs.Spec) *Container {
	t.Helper()
	pod := readyPod(t, agent)
	c := &Container{id: "c", bundle: t.TempDir(), spec: spec, pod: pod, extra: map[string]*Process{}, cleanup: undo{budget: time.Minute}}
	c.init = newProcess(c, "", Stdio{}, noIO{})
	require.NoError(t, c.makeStandIn(pod.running))
	pod.containers["c"] = c
	pod.goTracked(c.init.watch)
	return c
}

// exec adds a process that has been created in the guest.
func (c *Container) fakeExec(t *testing.T, id string) *Process {
	t.Helper()
	p := newProcess(c, id, Stdio{}, noIO{})
	require.NoError(t, c.reserve(p))
	return p
}

// Exits are known as the guest reports them: an init's is not held back for those of others, of which a hostile guest may
// say nothing.
func TestExitOfAnInitThatIsReportedFirst(t *testing.T) {
	agent := &scriptedAgent{}
	c := fakeContainer(t, agent, &specs.Spec{})
	require.NoError(t, c.init.Start(t.Context()))
	x, idle := c.fakeExec(t, "x"), c.fakeExec(t, "idle")
	require.NoError(t, x.Start(t.Context()))
	released := false
	c.cleanup.add(func(context.Context) { released = true })

	_, err := c.Delete(t.Context())
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "it runs")
	agent.exit("") <- 7
	exit, err := c.init.Wait(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 7, exit.Status)
	require.Equal(t, ProcessRunning, x.State().Status)

	// Its removal does not wait for ever either, and ends what the guest is silent about.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	exit, err = c.Delete(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 7, exit.Status)
	require.True(t, released)
	exit, err = x.Wait(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, statusLost, exit.Status)
	require.ErrorContains(t, exit.Err, "does not report the end of process c/x")
	require.Equal(t, ProcessCreated, idle.State().Status)
	require.Equal(t, []string{"start", "start", "delete"}, agent.calls)
}

// What a process wrote is delivered before its container is given back.
func TestDeleteWaitsForTheOutputOfOthers(t *testing.T) {
	agent := &scriptedAgent{}
	c := fakeContainer(t, agent, &specs.Spec{})
	require.NoError(t, c.init.Start(t.Context()))
	x := c.fakeExec(t, "x")
	require.NoError(t, x.Start(t.Context()))
	agent.exit("") <- 0
	_, err := c.init.Wait(t.Context())
	require.NoError(t, err)
	c.cleanup.add(func(context.Context) { require.Equal(t, ProcessStopped, x.State().Status) })
	deleted := make(chan error, 1)
	go func() {
		_, err := c.Delete(t.Context())
		deleted <- err
	}()
	agent.exit("x") <- 5
	require.NoError(t, <-deleted)
	exit, err := x.Wait(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 5, exit.Status)
}
