// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
)

func TestNewPodRefusesTheHostsNamespacesAtOnce(t *testing.T) {
	_, err := NewPod(context.Background(), PodConfig{ID: "p", Config: testConfig(tee.None), Network: NetworkHost, HostPID: true,
		HostIPC: true})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, word := range []string{"hostNetwork", "hostPID", "hostIPC"} {
		require.ErrorContains(t, err, word)
	}
	_, err = NewPod(context.Background(), PodConfig{ID: "../p"})
	require.ErrorContains(t, err, "sandbox id")
}

// What a pod that is not ready cannot do, and why.
func TestPodThatIsNotReady(t *testing.T) {
	for state, want := range map[PodState]struct {
		kind error
		word string
	}{
		PodCreated:  {errdefs.ErrFailedPrecondition, "has not been started"},
		PodStarting: {errdefs.ErrFailedPrecondition, "is starting"},
		PodStopped:  {errdefs.ErrUnavailable, "has ended: QEMU was killed"},
	} {
		p := &Pod{cfg: PodConfig{ID: "p"}, state: state}
		if state == PodStopped {
			p.exit.Err = errors.New("QEMU was killed")
		}
		_, statsErr := p.Stats(t.Context())
		_, insertErr := p.insert(&Container{id: "c"})
		for _, err := range []error{p.Ping(t.Context()), p.Update(t.Context(), nil), statsErr, insertErr} {
			require.ErrorIs(t, err, want.kind)
			require.ErrorContains(t, err, want.word)
		}
		require.Equal(t, state, p.Info().State)
		if state != PodCreated {
			require.ErrorIs(t, p.Start(t.Context()), want.kind)
		}
	}
}

// A Stop during Start ends the pod, whichever of the two looks first.
func TestStopDuringStart(t *testing.T) {
	for range 50 {
		p, r := startedPod(t, &fakeAgent{})
		var (
			both    sync.WaitGroup
			stopErr error
		)
		both.Go(func() { stopErr = p.Stop(context.Background()) })
		if err := p.endStart(r); err != nil {
			require.ErrorIs(t, err, errdefs.ErrUnavailable)
			p.end(Exit{Status: statusLost, Err: err}, false)
		}
		both.Wait()
		require.NoError(t, stopErr)
		<-p.Done()
		require.Equal(t, PodStopped, p.Info().State)
		require.EqualValues(t, 4711, p.Info().PID)
		require.Equal(t, "v1", p.Info().Extra["agentVersion"])
		require.ErrorIs(t, p.Ping(t.Context()), errdefs.ErrUnavailable)
	}
}
