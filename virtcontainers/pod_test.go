// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
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

func TestNeeds(t *testing.T) {
	doc := &hypervisor.Document{CPU: hypervisor.CPU{Count: 2}, Memory: hypervisor.Memory{Bytes: 400 << 20}}
	started := vmplan.Size{VCPUs: 2, MemoryBytes: 400 << 20}
	cfg := configs.Sizing{DefaultVCPUs: 8, DefaultMemoryMiB: 4096, OverheadMemoryMiB: 256, MaxMemoryMiB: 401}
	limits := func(memory, quota int64) *specs.LinuxResources {
		period := uint64(100_000)
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}}
	}
	for _, r := range []*specs.LinuxResources{
		nil, {}, {Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}}, limits(0, 0), limits(-1, -1), limits(144<<20, 200_000),
	} {
		size, err := needs(doc, started, cfg, r)
		require.NoError(t, err, "what is not stated does not count")
		require.Zero(t, size)
	}
	_, err := needs(doc, started, cfg, limits(145<<20, 0))
	require.ErrorIs(t, err, errdefs.ErrOutOfRange)
	require.ErrorContains(t, err, "a limit of 145 MiB needs a VM of 402 MiB: it was started with 400 MiB and can grow to 400 MiB")
	_, err = needs(doc, started, cfg, limits(0, 200_001))
	require.ErrorContains(t, err, "a limit of 3 CPUs: the VM was started with 2 and can grow to 2")

	doc.CPU.Count, doc.Memory.MaxBytes = 3, 500<<20
	size, err := needs(doc, started, cfg, limits(145<<20, 200_001))
	require.NoError(t, err)
	require.Equal(t, vmplan.Size{VCPUs: 3, MemoryBytes: 402 << 20}, size)
	_, err = needs(doc, started, cfg, limits(0, 300_001))
	require.ErrorContains(t, err, "can grow to 3")
}
