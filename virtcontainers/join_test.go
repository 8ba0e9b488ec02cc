// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/virtcontainers/refusal"
)

// The id of the process in a namespace's path tells the agent whose namespace is meant; paths that name nobody of the pod are
// refused.
func TestJoinedNamespaces(t *testing.T) {
	agent := &fakeAgent{}
	p := readyPod(t, agent)
	target, err := p.CreateContainer(t.Context(), containerConfig("target", &recordedIO{}))
	require.NoError(t, err)
	ended, err := p.CreateContainer(t.Context(), containerConfig("ended", &recordedIO{}))
	require.NoError(t, err)
	require.NoError(t, ended.Init().Kill(t.Context(), 9, true))
	waitFor(t, ended)
	pid := int(target.Init().State().PID)
	require.NotEqual(t, pid, int(ended.Init().State().PID))

	for name, tc := range map[string]struct {
		kind   specs.LinuxNamespaceType
		path   string
		target string
		reason string
	}{
		"own":                   {specs.PIDNamespace, "", "", ""},
		"the pod's":             {specs.PIDNamespace, "/proc/4711/ns/pid", "", ""},
		"another container's":   {specs.PIDNamespace, fmt.Sprintf("/proc/%d/ns/pid", pid), "target", ""},
		"ipc of the pod":        {specs.IPCNamespace, "/proc/4711/ns/ipc", "", ""},
		"uts of a container":    {specs.UTSNamespace, fmt.Sprintf("/proc/%d/ns/uts", pid), "", ""},
		"any network":           {specs.NetworkNamespace, "/run/netns/x", "", ""},
		"one that has ended":    {specs.PIDNamespace, fmt.Sprintf("/proc/%d/ns/pid", ended.Init().State().PID), "", "running container"},
		"the host's":            {specs.PIDNamespace, "/proc/1/ns/pid", "", "pid namespace /proc/1/ns/pid: leave it out"},
		"ipc of the host":       {specs.IPCNamespace, "/proc/1/ns/ipc", "", "ipc namespace /proc/1/ns/ipc"},
		"uts of the host":       {specs.UTSNamespace, "/proc/1/ns/uts", "", "uts namespace /proc/1/ns/uts"},
		"of no process":         {specs.PIDNamespace, "/proc/0/ns/pid", "", "pid namespace"},
		"of itself":             {specs.PIDNamespace, "/proc/self/ns/pid", "", "pid namespace"},
		"pinned":                {specs.IPCNamespace, "/run/ns/ipc", "", "ipc namespace"},
		"another kind":          {specs.PIDNamespace, "/proc/4711/ns/pid_for_children", "", "pid namespace"},
		"a path into a process": {specs.PIDNamespace, "/proc/4711/root/ns/pid", "", "pid namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(agent.created)
			cfg := containerConfig("c", &recordedIO{})
			cfg.Spec.Linux = &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: tc.kind, Path: tc.path}}}
			c, err := p.CreateContainer(t.Context(), cfg)
			if tc.reason != "" {
				require.ErrorContains(t, err, tc.reason)
				require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				require.Len(t, agent.created, before)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.target, agent.created[before].GetPidTarget())
			_, err = c.Delete(t.Context())
			require.NoError(t, err)
		})
	}

	// A container that is alone in its pod joins nobody's, and hears of it before its VM is made.
	cfg := containerConfig("alone", nil)
	cfg.Spec.Linux = &specs.Linux{Namespaces: []specs.LinuxNamespace{
		{Type: specs.PIDNamespace, Path: fmt.Sprintf("/proc/%d/ns/pid", pid)}, {Type: specs.IPCNamespace, Path: "/proc/1/ns/ipc"},
	}}
	_, err = planContainer(cfg.Spec, PodConfig{Only: cfg.Spec}, p.sharing, nil)
	reasons, other := refusal.Reasons(err)
	require.NoError(t, other)
	require.Len(t, reasons, 2)
}
