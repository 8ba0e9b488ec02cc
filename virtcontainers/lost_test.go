// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// noIO is the stdio of a process that has none.
type noIO struct{}

func (noIO) Attach(_, _, _ vsock.Conn)             {}
func (noIO) Drain(context.Context, uint64, uint64) {}
func (noIO) Close() error                          { return nil }

// A container whose VM was lost is released by the pod's end; containerd deletes it afterwards, perhaps twice.
func TestDeleteAfterTheVMWasLost(t *testing.T) {
	pod := &Pod{containers: map[string]*Container{}, state: PodStopped, exit: Exit{Err: errors.New("QEMU was killed")}}
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

// All that cannot be had is told at once, whether the specification shows it or the host's files do.
func TestUnshareableFilesAreToldWithTheRest(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer l.Close()
	bind := func(source, destination string) specs.Mount {
		return specs.Mount{Type: "bind", Source: source, Destination: destination}
	}
	fine := []specs.Mount{
		bind(t.TempDir(), "/folder"), bind("/nowhere", "/missing"), bind(socket, "/etc/hosts"), {Type: "tmpfs", Source: socket, Destination: "/tmp"},
	}
	require.NoError(t, withUnshareable(nil, &specs.Spec{Mounts: fine}, unshareable))

	spec := &specs.Spec{Mounts: append(fine, bind(socket, "/one"), bind("/dev/null", "/two"))}
	for _, before := range []error{nil, &RefusedError{Reasons: []string{"a device"}}} {
		var refused *RefusedError
		require.ErrorAs(t, withUnshareable(before, spec, unshareable), &refused)
		require.ErrorContains(t, refused, socket)
		require.ErrorContains(t, refused, "/two")
		if before != nil {
			require.ErrorContains(t, refused, "a device")
		}
	}
	other := errors.New("no process")
	require.Equal(t, other, withUnshareable(other, nil, unshareable))
}
