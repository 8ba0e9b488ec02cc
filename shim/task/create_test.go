// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/internal/podtest"
	"github.com/cloister-project/cloister/shim/pods"
)

func TestDeleteOfACreatedTask(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	require.Equal(t, uint32(137), f.remove("c", "").GetExitStatus())
	require.Equal(t, []string{"create c", "exit c/c 137", "delete c 137"}, f.events.events())
}

func TestDeleteThatTimesOutGoesOn(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	release := make(chan struct{})
	c := f.pods.Last().Container("c")
	c.OnDelete = func(context.Context) error {
		<-release
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := f.Delete(ctx, &taskapi.DeleteRequest{ID: "c"})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	f.shutdown() // containerd asks, and goes
	second := make(chan error, 1)
	go func() {
		_, err := f.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
		second <- err
	}()
	close(release)
	require.NoError(t, <-second)
	require.Equal(t, uint32(137), f.remove("c", "").GetExitStatus())
	require.Equal(t, []string{"create c", "exit c/c 137", "delete c 137"}, f.events.events(), "deleted once")
	require.Eventually(t, func() bool { return f.ended() == 1 }, 10*time.Second, time.Millisecond)
}

func TestDeleteThatFailsCanBeRepeated(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	c := f.pods.Last().Container("c")
	c.OnDelete = func(context.Context) error { return errdefs.ErrUnavailable }
	_, err := f.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	c.OnDelete = nil
	f.remove("c", "")
}

func TestCreateThatFails(t *testing.T) {
	for name, tt := range map[string]struct {
		prepare func(f *fixture)
		want    error
	}{
		"configuration": {func(f *fixture) { f.pods.Err = errdefs.ErrInvalidArgument }, errdefs.ErrInvalidArgument},
		"boot": {func(f *fixture) {
			f.pods.Prepare = func(p *podtest.Pod) {
				p.OnStart = func(context.Context) error { return errdefs.ErrUnavailable }
			}
		}, errdefs.ErrUnavailable},
		"container": {func(f *fixture) {
			f.pods.Prepare = func(p *podtest.Pod) {
				p.OnCreate = func(context.Context) error { return errdefs.ErrNotFound }
			}
		}, errdefs.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			tt.prepare(f)
			dir := f.bundle("c", nil)
			_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c", Bundle: dir})
			require.ErrorIs(t, err, tt.want)
			if p := f.pods.Last(); p != nil {
				require.False(t, p.Ready())
			}
			require.Equal(t, pods.ModeNone, f.holder.Mode())
			_, err = f.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			require.Empty(t, f.events.events())
			f.shutdown()
			require.Equal(t, 1, f.ended())

			f.pods.Err, f.pods.Prepare = nil, nil
			f.create("c", nil)
		})
	}
}

func TestCreateThatIsGivenUp(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	undoing := make(chan struct{})
	f.pods.Prepare = func(p *podtest.Pod) {
		p.OnCreate = func(ctx context.Context) error {
			cancel()
			<-ctx.Done()
			<-undoing
			return ctx.Err()
		}
	}
	dir := f.bundle("c", nil)
	created := make(chan error, 1)
	go func() {
		_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c", Bundle: dir})
		created <- err
	}()
	<-ctx.Done()
	// containerd cleans up while the creation is being undone.
	_, err := f.State(t.Context(), &taskapi.StateRequest{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	short, cancelShort := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancelShort()
	_, err = f.Delete(short, &taskapi.DeleteRequest{ID: "c"})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	f.shutdown()
	require.Zero(t, f.ended())
	close(undoing)
	require.ErrorIs(t, <-created, context.Canceled)
	require.False(t, f.pods.Last().Ready())
	require.Equal(t, 1, f.ended(), "the end that containerd asked for comes when all is undone")
}

func TestCreateWhoseCallerLeavesAtTheEnd(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	f.pods.Prepare = func(p *podtest.Pod) {
		p.OnCreate = func(context.Context) error {
			cancel()
			return nil
		}
	}
	_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c", Bundle: f.bundle("c", nil)})
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, f.pods.Last().Ready())
	require.Equal(t, pods.ModeNone, f.holder.Mode())
	require.Empty(t, f.events.events())
}

func TestCreateRefuses(t *testing.T) {
	f := newFixture(t)
	good := f.bundle("c", nil)
	for name, tt := range map[string]struct {
		r    *taskapi.CreateTaskRequest
		want error
	}{
		"no id":             {&taskapi.CreateTaskRequest{Bundle: good}, errdefs.ErrInvalidArgument},
		"relative bundle":   {&taskapi.CreateTaskRequest{ID: "c", Bundle: "c"}, errdefs.ErrInvalidArgument},
		"checkpoint":        {&taskapi.CreateTaskRequest{ID: "c", Bundle: good, Checkpoint: "/x"}, errdefs.ErrNotImplemented},
		"parent checkpoint": {&taskapi.CreateTaskRequest{ID: "c", Bundle: good, ParentCheckpoint: "/x"}, errdefs.ErrNotImplemented},
		"no specification":  {&taskapi.CreateTaskRequest{ID: "c", Bundle: t.TempDir()}, errdefs.ErrNotFound},
		"streaming": {&taskapi.CreateTaskRequest{ID: "c", Bundle: good, Stdout: "ttrpc+unix:///s?streaming_id=c"},
			errdefs.ErrNotImplemented},
		"options": {&taskapi.CreateTaskRequest{ID: "c", Bundle: good, Options: &anypb.Any{TypeUrl: "other.v1.Options"}},
			errdefs.ErrInvalidArgument},
		"no sandbox": {&taskapi.CreateTaskRequest{ID: "m", Bundle: f.bundle("m", member("s"))}, errdefs.ErrFailedPrecondition},
		"container type": {&taskapi.CreateTaskRequest{ID: "m", Bundle: f.bundle("t", map[string]string{pods.AnnotationContainerType: "x"})},
			errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := f.Create(t.Context(), tt.r)
			require.ErrorIs(t, err, tt.want)
			require.Equal(t, pods.ModeNone, f.holder.Mode())
		})
	}
	f.create("c", nil)
	_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c", Bundle: good})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "d", Bundle: f.bundle("d", nil)})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "a VM for one container takes no second")
	_, err = f.Checkpoint(t.Context(), &taskapi.CheckpointTaskRequest{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}
