// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// The pods of these tests, like a hostile guest, report an init's exit before those of the container's other processes.

func TestInitExitIsTheLast(t *testing.T) {
	f := newFixture(t)
	f.create("p", pause("p"))
	f.start("p", "")
	for i := range 20 {
		id := fmt.Sprintf("c%d", i)
		f.create(id, member("p"))
		f.start(id, "")
		for j := range 5 {
			x := fmt.Sprint(j)
			f.exec(id, x)
			f.start(id, x)
		}
		f.exec(id, "never")
		c := f.pods.Last().Container(id)
		c.InitProcess().Exit(0)
		f.awaitEnding(id)
		require.NotContains(t, f.events.events(), fmt.Sprintf("exit %s/%s 0", id, id))
		for j := range 5 {
			c.ExecProcess(fmt.Sprint(j)).Exit(137)
		}
		f.wait(id, "")
		events := f.events.events()
		require.Equal(t, fmt.Sprintf("exit %s/%s 0", id, id), events[len(events)-1])
		for j := range 5 {
			require.Contains(t, events, fmt.Sprintf("exit %s/%d 137", id, j))
		}
		_, err := f.Start(t.Context(), &taskapi.StartRequest{ID: id, ExecID: "never"})
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		f.remove(id, "")
	}
}

// awaitEnding waits until the service has seen the exit of a container's init.
func (f *fixture) awaitEnding(id string) {
	f.t.Helper()
	task, err := f.task(id)
	require.NoError(f.t, err)
	require.Eventually(f.t, func() bool {
		task.mu.Lock()
		defer task.mu.Unlock()
		return task.ending
	}, 10*time.Second, time.Millisecond)
}

// slowStart makes the Start of an exec wait, and begins it.
func (f *fixture) slowStart(id, execID string) (goOn chan<- error, result <-chan error) {
	f.exec(id, execID)
	under, wait, done := make(chan struct{}), make(chan error), make(chan error, 1)
	f.pods.Last().Container(id).OnExecStart = func(context.Context) error {
		close(under)
		return <-wait
	}
	go func() {
		_, err := f.Start(f.t.Context(), &taskapi.StartRequest{ID: id, ExecID: execID})
		done <- err
	}()
	<-under
	return wait, done
}

func TestInitExitWaitsForAStartUnderWay(t *testing.T) {
	for name, tc := range map[string]struct {
		start error
		want  []string
	}{
		"that works": {nil, []string{"create c", "start c", "exec-added c/x", "exec-started c/x", "exit c/x 5", "exit c/c 0"}},
		"that fails": {errdefs.ErrNotFound, []string{"create c", "start c", "exec-added c/x", "exit c/c 0"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.create("c", nil)
			f.start("c", "")
			goOn, result := f.slowStart("c", "x")
			c := f.pods.Last().Container("c")
			c.InitProcess().Exit(0)
			f.awaitEnding("c")
			require.NotContains(t, f.events.events(), "exit c/c 0")
			goOn <- tc.start
			require.ErrorIs(t, <-result, tc.start)
			if tc.start == nil {
				c.ExecProcess("x").Exit(5)
				require.Equal(t, uint32(5), f.wait("c", "x"))
			}
			require.Zero(t, f.wait("c", ""))
			require.Equal(t, tc.want, f.events.events())
			f.remove("c", "")
		})
	}
}

// A guest that keeps silent about an exec holds neither the container's exit back nor changes the order.
func TestExecThatNeverEnds(t *testing.T) {
	f := newFixture(t)
	f.lastExitTime = time.Millisecond
	f.create("c", nil)
	f.start("c", "")
	f.exec("c", "x")
	f.start("c", "x")
	c := f.pods.Last().Container("c")
	c.InitProcess().Exit(3)
	require.Equal(t, uint32(3), f.wait("c", ""))
	require.Equal(t, uint32(137), f.wait("c", "x"))
	f.remove("c", "x")
	f.remove("c", "")
	require.Equal(t, []string{
		"create c", "start c", "exec-added c/x", "exec-started c/x", "exit c/x 137", "exit c/c 3", "delete c 3",
	}, f.events.events())
}

func TestStartThatNeverReturns(t *testing.T) {
	f := newFixture(t)
	f.lastExitTime = time.Millisecond
	f.create("c", nil)
	f.start("c", "")
	goOn, result := f.slowStart("c", "x")
	c := f.pods.Last().Container("c")
	c.InitProcess().Exit(3)
	require.Equal(t, uint32(3), f.wait("c", ""))
	goOn <- nil
	require.ErrorIs(t, <-result, errdefs.ErrFailedPrecondition)
	require.Equal(t, uint32(137), f.wait("c", "x"))
	f.remove("c", "x")
	f.remove("c", "")
	require.Equal(t, []string{"create c", "start c", "exec-added c/x", "exit c/c 3", "delete c 3"}, f.events.events())
}

func TestOrderWhenTheVMIsLost(t *testing.T) {
	f := newFixture(t)
	f.create("p", pause("p"))
	f.start("p", "")
	var want []string
	for _, id := range []string{"a", "b"} {
		f.create(id, member("p"))
		f.start(id, "")
		for j := range 3 {
			x := fmt.Sprintf("%s%d", id, j)
			f.exec(id, x)
			f.start(id, x)
			want = append(want, fmt.Sprintf("exit %s/%s 137", id, x))
		}
		want = append(want, fmt.Sprintf("exit %s/%s 137", id, id))
	}
	before := len(f.events.events())
	f.pods.Last().Lose(errors.New("QEMU was killed"))
	require.Equal(t, uint32(137), f.wait("p", ""))
	events := f.events.events()[before:]
	require.ElementsMatch(t, append(want, "exit p/p 137"), events)
	require.Equal(t, "exit p/p 137", events[len(events)-1])
	for _, id := range []string{"a", "b"} {
		init := fmt.Sprintf("exit %s/%s 137", id, id)
		for j := range 3 {
			require.Less(t, slices.Index(events, fmt.Sprintf("exit %s/%s%d 137", id, id, j)), slices.Index(events, init), events)
		}
	}
}

// A Delete that comes when the init has ended, but its exit is still held back, waits for its turn.
func TestDeleteWhileTheExitIsHeldBack(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	f.exec("c", "x")
	f.start("c", "x")
	c := f.pods.Last().Container("c")
	deleting := make(chan struct{})
	c.OnDelete = func(context.Context) error {
		close(deleting)
		return nil
	}
	c.InitProcess().Exit(3)
	f.awaitEnding("c")
	removed := make(chan *taskapi.DeleteResponse, 1)
	go func() {
		resp, _ := f.Delete(f.t.Context(), &taskapi.DeleteRequest{ID: "c"})
		removed <- resp
	}()
	<-deleting
	c.ExecProcess("x").Exit(9)
	require.Equal(t, uint32(3), (<-removed).GetExitStatus())
	require.Equal(t, []string{
		"create c", "start c", "exec-added c/x", "exec-started c/x", "exit c/x 9", "exit c/c 3", "delete c 3",
	}, f.events.events())
}
