// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestExec(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	f.exec("c", "x")
	require.False(t, f.pods.Last().Container("c").ExecProcess("x").Spec.Terminal, "the request tells, not the specification")
	_, err := f.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "c", ExecID: "x", Spec: &anypb.Any{Value: []byte("{}")}})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = f.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "c", Spec: &anypb.Any{Value: []byte("{}")}})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = f.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "c", ExecID: "y"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = f.ResizePty(t.Context(), &taskapi.ResizePtyRequest{ID: "c", ExecID: "x", Width: 80, Height: 24})
	require.NoError(t, err, "before the start")

	f.start("c", "x")
	_, err = f.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "x"})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	pids, err := f.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"})
	require.NoError(t, err)
	require.Len(t, pids.GetProcesses(), 2)
	require.Equal(t, "containerd.runc.v1.ProcessDetails", pids.GetProcesses()[1].GetInfo().GetTypeUrl())
	_, err = f.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: "x"})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)

	f.pods.Last().Container("c").ExecProcess("x").Exit(3)
	require.Equal(t, uint32(3), f.wait("c", "x"))
	require.Equal(t, uint32(3), f.remove("c", "x").GetExitStatus())
	require.Equal(t, uint32(3), f.remove("c", "x").GetExitStatus())

	// The id is used again.
	f.exec("c", "x")
	f.start("c", "x")
	f.pods.Last().Container("c").ExecProcess("x").Exit(4)
	require.Equal(t, uint32(4), f.wait("c", "x"))
	require.Equal(t, uint32(4), f.remove("c", "x").GetExitStatus())
	require.Equal(t, []string{
		"create c", "start c",
		"exec-added c/x", "exec-started c/x", "exit c/x 3",
		"exec-added c/x", "exec-started c/x", "exit c/x 4",
	}, f.events.events())
}

func TestExecThatIsNeverStarted(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	f.exec("c", "x")
	waited := make(chan error, 1)
	go func() {
		_, err := f.Wait(t.Context(), &taskapi.WaitRequest{ID: "c", ExecID: "x"})
		waited <- err
	}()
	f.remove("c", "x")
	if err := <-waited; err != nil {
		require.ErrorIs(t, err, errdefs.ErrNotFound)
	}
}

func TestExecThatCannotBeStarted(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	f.exec("c", "x")
	f.pods.Last().Container("c").OnExecStart = func(context.Context) error {
		return fmt.Errorf("no such file: %w", errdefs.ErrNotFound)
	}
	_, err := f.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "x"})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Equal(t, uint32(127), f.wait("c", "x"))
	require.Equal(t, tasktypes.Status_STOPPED, f.status("c", "x"))
	require.Equal(t, uint32(127), f.remove("c", "x").GetExitStatus())
	require.Equal(t, []string{"create c", "start c", "exec-added c/x"}, f.events.events())
}
