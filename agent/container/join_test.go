// SPDX-License-Identifier: Apache-2.0

package container

import (
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// join makes a container that joins another's pid namespace.
func (b *bench) join(id, target string, spec *specs.Spec, stdio *agentv1.Stdio) error {
	b.t.Helper()
	raw, err := json.Marshal(spec)
	require.NoError(b.t, err)
	return b.m.Create(ctx(b.t), &agentv1.CreateContainerRequest{ContainerId: id, Spec: raw, Stdio: stdio, PidTarget: target})
}

func TestJoinPIDNamespace(t *testing.T) {
	b := newBench(t, false)
	b.run("target", testSpec(script("trap 'exit 9' TERM; while :; do sleep 0.1; done")), nil)
	start := func(id, text string, stdio *agentv1.Stdio) {
		t.Helper()
		require.NoError(t, b.join(id, "target", testSpec(script(text), sharePID(true)), stdio))
		_, err := b.m.Start(ctx(t), id, "")
		require.NoError(t, err)
	}
	out := b.stream()
	start("one", "tr '\\0' ' ' < /proc/1/cmdline; echo; ls /proc/1/root/bin/busybox; [ $$ = 1 ] || echo not 1; sleep 1000 & echo; wait",
		&agentv1.Stdio{Stdout: out.id.String()})
	got := out.until(t, "not 1\n\n")
	require.Contains(t, got, "trap 'exit 9' TERM")
	require.Contains(t, got, "/proc/1/root/bin/busybox\n", "as on runc")
	require.Len(t, b.pids("one"), 2)

	// Its end takes its own processes along, and leaves the target alive.
	require.NoError(t, b.m.Signal("one", "", uint32(unix.SIGKILL), false))
	require.EqualValues(t, 137, b.wait("one", "").GetExitStatus())
	b.remove("one")
	require.NotEmpty(t, b.pids("target"))

	// The target's end takes those along that run in its namespace, and those that only wait for their start.
	start("two", "sleep 1000", nil)
	require.NoError(t, b.exec("two", "e", script("sleep 1000"), nil))
	require.NoError(t, b.join("three", "two", testSpec(script("true"), sharePID(true)), nil))
	start("killer", "kill -TERM 1; sleep 1000", nil)
	require.EqualValues(t, 9, b.wait("target", "").GetExitStatus())
	for _, id := range []string{"two", "three", "killer"} {
		require.EqualValues(t, 137, b.wait(id, "").GetExitStatus(), id)
	}
	require.EqualValues(t, 137, b.wait("two", "e").GetExitStatus())
	_, err := b.m.Start(ctx(t), "three", "")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)

	err = b.join("late", "target", testSpec(script("true"), sharePID(true)), nil)
	require.EqualError(t, err, `create container "late": join the pid namespace of container "target": it has stopped: failed precondition`)
	b.gone("late")
	for _, id := range []string{"two", "three", "killer", "target"} {
		b.remove(id)
	}
}

func TestJoinPIDNamespaceRefuses(t *testing.T) {
	b := newBench(t, false)
	b.run("target", testSpec(script("sleep 1000")), nil)
	for name, tc := range map[string]struct {
		target string
		change func(*specs.Spec)
		is     func(error) bool
		want   string
	}{
		"unknown":       {"nobody", sharePID(true), errdefs.IsNotFound, `container "nobody": not found`},
		"path":          {"../target", sharePID(true), errdefs.IsNotFound, "not found"},
		"itself":        {"c", sharePID(true), errdefs.IsFailedPrecondition, "being created"},
		"own namespace": {"target", sharePID(false), errdefs.IsInvalidArgument, "spec joins no pid namespace"},
		"none named": {"target", func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] }, errdefs.IsInvalidArgument,
			"spec joins no pid namespace"},
		"no linux": {"target", func(s *specs.Spec) { s.Linux = nil }, errdefs.IsInvalidArgument, "spec joins no pid namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			err := b.join("c", tc.target, testSpec(script("true"), tc.change), nil)
			require.ErrorContains(t, err, tc.want)
			require.True(t, tc.is(err), "%v", err)
			b.gone("c")
		})
	}
}
