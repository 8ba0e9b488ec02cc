// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// noIO is the stdio of a process that has none.
type noIO struct{}

func (noIO) Attach(_, _, _ vsock.Conn)             {}
func (noIO) Drain(context.Context, uint64, uint64) {}
func (noIO) Close() error                          { return nil }

// A container whose VM was lost is released by the pod's end; containerd deletes it afterwards, perhaps twice.
func TestDeleteAfterTheVMWasLost(t *testing.T) {
	pod := &Pod{
		cfg: PodConfig{Config: &configs.Config{}}, containers: map[string]*Container{},
		state: PodStopped, exit: Exit{Err: errors.New("QEMU was killed")},
	}
	released := 0
	c := &Container{id: "c", pod: pod, extra: map[string]*Process{}, cleanup: undo{budget: time.Minute}}
	c.init = newProcess(c, "", Stdio{}, noIO{})
	c.init.status = ProcessRunning
	c.cleanup.add(func(context.Context) { released++ })
	c.abandon(t.Context())
	require.Equal(t, 1, released)
	for range 2 {
		exit, err := c.Delete(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, statusLost, exit.Status)
		require.ErrorContains(t, exit.Err, "QEMU was killed")
	}
	require.Equal(t, 1, released)
}
