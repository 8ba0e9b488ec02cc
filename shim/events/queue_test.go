// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder takes events, after it refused the first fail of them with err.
type recorder struct {
	mu   sync.Mutex
	fail int
	err  error
	got  []string
}

func (r *recorder) send(_ context.Context, e *types.Envelope) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail > 0 {
		r.fail--
		return r.err
	}
	v, err := typeurl.UnmarshalAny(e.GetEvent())
	if err != nil {
		return err
	}
	r.got = append(r.got, e.GetNamespace()+e.GetTopic()+" "+v.(interface{ GetContainerID() string }).GetContainerID())
	return nil
}

func TestTopics(t *testing.T) {
	for _, e := range []any{
		&eventstypes.TaskCreate{}, &eventstypes.TaskStart{}, &eventstypes.TaskOOM{}, &eventstypes.TaskExit{}, &eventstypes.TaskDelete{},
		&eventstypes.TaskExecAdded{}, &eventstypes.TaskExecStarted{}, &eventstypes.TaskPaused{}, &eventstypes.TaskResumed{},
	} {
		require.Equal(t, runtime.GetTopic(e), Topic(e))
	}
	require.Empty(t, Topic(&eventstypes.ImageCreate{}))
}

func TestOrderIsKeptWhenContainerdIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{fail: 12, err: fmt.Errorf("gone: %w", errdefs.ErrUnavailable)}
		q := NewQueue(t.Context(), "k8s.io", r.send)
		q.Publish(&eventstypes.TaskCreate{ContainerID: "a"})
		q.Publish(&eventstypes.TaskStart{ContainerID: "a"})
		q.Publish(&eventstypes.TaskExit{ContainerID: "a"})
		q.Publish(&eventstypes.ImageCreate{}) // no event of ours
		time.Sleep(2 * time.Minute)
		require.NoError(t, q.Close(t.Context()))
		require.Equal(t, []string{"k8s.io/tasks/create a", "k8s.io/tasks/start a", "k8s.io/tasks/exit a"}, r.got)
	})
}

func TestRefusedEventIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{fail: maxRefused, err: errdefs.ErrInvalidArgument}
		q := NewQueue(t.Context(), "n", r.send)
		q.Publish(&eventstypes.TaskCreate{ContainerID: "a"})
		q.Publish(&eventstypes.TaskStart{ContainerID: "a"})
		time.Sleep(time.Minute)
		require.NoError(t, q.Close(t.Context()))
		require.Equal(t, []string{"n/tasks/start a"}, r.got)
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{fail: 1, err: errdefs.ErrUnavailable}
		q := NewQueue(t.Context(), "n", r.send)
		for i := range maxQueued + 10 {
			q.Publish(&eventstypes.TaskStart{ContainerID: fmt.Sprint(i)})
		}
		require.NoError(t, q.Close(t.Context()))
		require.Equal(t, fmt.Sprintf("n/tasks/start %d", maxQueued+9), r.got[len(r.got)-1])
		require.LessOrEqual(t, len(r.got), maxQueued+1)
		q.Publish(&eventstypes.TaskStart{ContainerID: "late"})
	})
}

func TestCloseGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{fail: 1 << 30, err: errdefs.ErrUnavailable}
		q := NewQueue(t.Context(), "n", r.send)
		q.Publish(&eventstypes.TaskStart{ContainerID: "a"})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		err := q.Close(ctx)
		require.True(t, errors.Is(err, context.DeadlineExceeded), err)
	})
}
