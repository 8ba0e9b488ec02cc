// SPDX-License-Identifier: Apache-2.0

package container

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// These tests need cgroup v2 with controllers. Run the test's binary as root in a VM, see doc.go.

func limits(r *specs.LinuxResources) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Linux.Resources = r }
}

func TestOOMKill(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 0.1; x=$(cat /dev/zero | tr '\\0' a)"), limits(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(16 << 20))}, Unified: map[string]string{"memory.oom.group": "1"},
	})), nil)
	r := b.wait("c", "")
	require.EqualValues(t, 137, r.GetExitStatus())
	require.NotZero(t, r.GetOomKills())
	events, err := b.m.NextEvents(ctx(t), 0)
	require.NoError(t, err)
	require.Equal(t, "c", events[0].GetContainerId())
	require.NotZero(t, events[0].GetOom().GetTotal())
	last := events[len(events)-1]
	require.Equal(t, r.GetOomKills(), last.GetOom().GetTotal(), "told before the exit")

	// The count stays readable until the container is deleted: containerd looks at it after an exit with 137.
	m, err := b.m.Stats("c")
	require.NoError(t, err)
	require.NotZero(t, m.GetMemoryEvents().GetOomKill())
	b.remove("c")
}

// The event comes while the container lives.
func TestOOMKillOfAChild(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	b.run("c", testSpec(script("echo 1000 >/proc/self/oom_score_adj; (x=$(cat /dev/zero | tr '\\0' a)); sleep 1000"),
		limits(&specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(int64(16 << 20))},
		})), nil)
	events, err := b.m.NextEvents(ctx(t), 0)
	require.NoError(t, err)
	require.Equal(t, "c", events[0].GetContainerId())
	b.remove("c")
}

func TestLimitsAndStats(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 1000"), limits(&specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(64 << 20))},
		CPU:     &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0-63", Mems: "0"},
		Pids:    &specs.LinuxPids{Limit: ptr(int64(30))},
		Unified: map[string]string{"memory.high": "60000000"},
	})), nil)
	file := func(name string) string {
		raw, err := os.ReadFile(filepath.Join(cgroupMount, testCgroup(), "c", name))
		require.NoError(t, err)
		return string(raw)
	}
	require.Equal(t, "67108864\n", file("memory.max"))
	require.Equal(t, "59998208\n", file("memory.high"))
	require.Equal(t, "50000 100000\n", file("cpu.max"))
	require.Equal(t, "30\n", file("pids.max"))
	require.NoError(t, b.m.Update(ctx(t), "c", []byte(`{"memory":{"limit":134217728},"cpu":{"quota":-1}}`)))
	require.Equal(t, "134217728\n", file("memory.max"))
	require.Equal(t, "max 100000\n", file("cpu.max"))
	require.Equal(t, "30\n", file("pids.max"))
	require.NoError(t, b.exec("c", "after-update", script("true"), nil))
	b.wait("c", "after-update")
	require.True(t, errdefs.IsInvalidArgument(b.m.Update(ctx(t), "c", []byte(`{"unified":{"cgroup.freeze":"1"}}`))))

	check := func(m *stats.Metrics) {
		require.NotZero(t, m.GetCPU().GetUsageUsec())
		require.NotZero(t, m.GetMemory().GetMaxUsage())
	}
	m, err := b.m.Stats("c")
	require.NoError(t, err)
	check(m)
	require.EqualValues(t, 134217728, m.GetMemory().GetUsageLimit())
	require.EqualValues(t, 1, m.GetPids().GetCurrent())
	sum, err := b.m.PodStats()
	require.NoError(t, err)
	check(sum)
	require.NoError(t, b.m.Signal("c", "", uint32(unix.SIGKILL), false))
	b.wait("c", "")
	m, err = b.m.Stats("c")
	require.NoError(t, err, "after the exit")
	require.NotZero(t, m.GetCPU().GetUsageUsec())
	b.remove("c")
	_, err = b.m.Stats("c")
	require.True(t, errdefs.IsNotFound(err))
}

func TestPauseAndResume(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	in, out := b.stream(), b.stream()
	b.run("c", testSpec(script("while read x; do echo $x; done")), &agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String()})
	_, err := in.Write([]byte("a\n"))
	require.NoError(t, err)
	out.until(t, "a\n")
	require.NoError(t, b.m.Pause(ctx(t), "c"))
	require.True(t, errdefs.IsFailedPrecondition(b.m.Pause(ctx(t), "c")))
	require.True(t, errdefs.IsFailedPrecondition(b.exec("c", "e", script("true"), nil)))
	_, err = in.Write([]byte("b\n"))
	require.NoError(t, err)
	require.NoError(t, b.m.Resume(ctx(t), "c"))
	out.until(t, "b\n")
	// A frozen container can be killed.
	require.NoError(t, b.m.Pause(ctx(t), "c"))
	require.NoError(t, b.m.Signal("c", "", uint32(unix.SIGKILL), false))
	require.EqualValues(t, 137, b.wait("c", "").GetExitStatus())
	b.remove("c")
}

func TestDeviceCgroup(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	out := b.stream()
	p := script("mknod /dev/kmsg c 1 11 && cat /dev/kmsg 2>&1 | head -c 200; head -c 4 /dev/zero | wc -c; mknod /dev/x b 7 0; cat /dev/x " +
		"2>&1; echo end")
	p.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_MKNOD", "CAP_SYS_ADMIN"},
		Effective: []string{"CAP_MKNOD", "CAP_SYS_ADMIN"}, Permitted: []string{"CAP_MKNOD", "CAP_SYS_ADMIN"}}
	b.run("c", testSpec(p, limits(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}})),
		&agentv1.Stdio{Stdout: out.id.String()})
	got := out.all(t)
	require.Contains(t, got, "'/dev/kmsg': Operation not permitted")
	require.Contains(t, got, "'/dev/x': Operation not permitted")
	require.Contains(t, got, "4\nc")
	b.wait("c", "")
	b.remove("c")
}

func TestUserNamespace(t *testing.T) {
	needCgroup2(t)
	b := newBench(t, false)
	out := b.stream()
	spec := testSpec(script("cat /proc/self/uid_map; id -u; echo end"))
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/proc/1/ns/user"})
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	b.run("c", spec, &agentv1.Stdio{Stdout: out.id.String()})
	require.Regexp(t, `^ +0 +65536 +65536\n0\nend\n$`, out.all(t))
	b.wait("c", "")
	b.remove("c")
}
