// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func testGuest() *Guest {
	return &Guest{
		Cgroup: "/pod", IPC: "/ns/ipc", UTS: "/ns/uts", PID: "/ns/pid", cpus: func() int { return 2 }, nrOpen: 1 << 20,
		device: func(path string) (int64, int64, bool) { return 10, 229, path == "/dev/fuse" },
	}
}

func ptr[T any](v T) *T { return &v }

// testSpec is a specification as containerd writes it for a pod's container.
func testSpec(change ...func(*specs.Spec)) *specs.Spec {
	s := &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", "true"}, Cwd: "/", Env: []string{"PATH=/bin", "HOME=/"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"},
			{Type: specs.IPCNamespace, Path: "/proc/1/ns/ipc"}, {Type: specs.UTSNamespace, Path: "/proc/1/ns/uts"},
		}},
	}
	for _, f := range change {
		f(s)
	}
	return s
}

func TestContainerSpecRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"no process": {func(s *specs.Spec) { s.Process = nil }, "no process"},
		"no linux":   {func(s *specs.Spec) { s.Linux = nil }, "no linux"},
		"hooks":      {func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true"}}} }, "hooks"},
		//lint:ignore SA1019 deprecated hooks are refused like the others
		"old hooks":          {func(s *specs.Spec) { s.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "/bin/true"}}} }, "hooks"},
		"mounts":             {func(s *specs.Spec) { s.Mounts = []specs.Mount{{Destination: "/x", Source: "/", Type: "bind"}} }, "mounts"},
		"windows":            {func(s *specs.Spec) { s.Windows = &specs.Windows{} }, "not for Linux"},
		"vm":                 {func(s *specs.Spec) { s.VM = &specs.VM{} }, "not for Linux"},
		"time namespace":     {ns(specs.TimeNamespace, ""), "time namespaces"},
		"unknown namespace":  {ns("magic", ""), "not known"},
		"doubled namespace":  {ns(specs.PIDNamespace, ""), "named twice"},
		"userns, no mapping": {ns(specs.UserNamespace, ""), "uidMappings"},
		"time offsets": {func(s *specs.Spec) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}}
		}, "timeOffsets"},
		"net devices":         {func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} }, "netDevices"},
		"seccomp listener":    {func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/run/x"} }, "listenerPath"},
		"propagation":         {func(s *specs.Spec) { s.Linux.RootfsPropagation = "wild" }, "rootfsPropagation"},
		"masked path":         {func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"proc"} }, "absolute"},
		"read-only path":      {func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"/x\x00"} }, "absolute"},
		"net sysctl":          {sysctl("net.ipv4.ip_forward"), "set it on the pod"},
		"ipc sysctl of pod":   {sysctl("kernel.shmmax"), "set it on the pod"},
		"uts sysctl of pod":   {sysctl("kernel.domainname"), "set it on the pod"},
		"kernel sysctl":       {sysctl("kernel.core_pattern"), "not allowed"},
		"sysctl with slashes": {sysctl("kernel/core_pattern"), "not allowed"},
		"block device":        {device("/dev/sda", "b", 8, 0), "character devices"},
		"fifo":                {device("/dev/x", "p", 0, 0), "character devices"},
		"device of host":      {device("/dev/mem", "c", 1, 1), "not one that the guest gives"},
		"null that is mem":    {device("/dev/null", "c", 1, 1), "in the guest it is 1:3"},
		"fuse that is not":    {device("/dev/fuse", "c", 1, 1), "does not exist"},
		"no tun here":         {device("/dev/net/tun", "c", 10, 200), "does not exist"},
		"unified procs":       {unified("cgroup.procs", "1"), "not allowed"},
		"unified path":        {unified("../memory.max", "1"), "not a cgroup v2 limit"},
		"unified lines":       {unified("memory.max", "1\n2"), "not a cgroup v2 limit"},
		"unified unknown":     {unified("memory.reclaim", "1"), "not allowed"},
		"no args":             {func(s *specs.Spec) { s.Process.Args = nil }, "args is empty"},
		"relative cwd":        {func(s *specs.Spec) { s.Process.Cwd = "x" }, "cwd"},
		"NUL in env":          {func(s *specs.Spec) { s.Process.Env = []string{"A=\x00"} }, "NUL"},
		"terminal mismatch":   {func(s *specs.Spec) { s.Process.Terminal = true }, "terminal"},
		"scheduler":           {func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{} }, "scheduler"},
		"unknown rlimit":      {func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }, "not known"},
		"umask":               {func(s *specs.Spec) { s.Process.User.Umask = ptr(uint32(0o1777)) }, "umask"},
		"too many groups":     {func(s *specs.Spec) { s.Process.User.AdditionalGids = make([]uint32, maxGroups+1) }, "groups"},
		"negative memory": {func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-2))}}
		}, "negative"},
		"device named twice": {func(s *specs.Spec) { device("/dev/zero", "c", 1, 5)(s); device("/dev/zero", "c", 1, 5)(s) }, "twice"},
		"rlimit named twice": {func(s *specs.Spec) {
			s.Process.Rlimits = make([]specs.POSIXRlimit, 2)
			s.Process.Rlimits[0].Type, s.Process.Rlimits[1].Type = "RLIMIT_AS", "RLIMIT_AS"
		}, "twice"},
		"fuse without numbers": {device("/dev/fuse", "c", 0, 0), "does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := testGuest().Container("c", testSpec(tc.change), false)
			require.ErrorContains(t, err, tc.want)
			require.True(t, errdefs.IsInvalidArgument(err))
		})
	}
}

func ns(kind specs.LinuxNamespaceType, path string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: path})
	}
}

func sysctl(key string) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{key: "1"} }
}

func unified(key, value string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{Unified: map[string]string{key: value}}
	}
}

func device(path, kind string, major, minor int64) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: path, Type: kind, Major: major, Minor: minor})
	}
}

func TestContainerSpecKeepsAndDrops(t *testing.T) {
	in := testSpec(func(s *specs.Spec) {
		s.Annotations = map[string]string{"org.systemd.property.X": "1"}
		s.Hooks = &specs.Hooks{}
		s.Root = &specs.Root{Path: "/etc", Readonly: true}
		s.Hostname = "other"
		s.Process.ApparmorProfile, s.Process.SelinuxLabel = "host", "host"
		s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "7"}
		s.Process.OOMScoreAdj = ptr(-1000)
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1 << 30, Soft: 1024}}
		s.Linux.CgroupsPath = "../../x"
		s.Linux.MountLabel = "host"
		s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"}
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{}
		s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
		s.Linux.MaskedPaths = []string{"/proc/kcore"}
		s.Linux.Resources = &specs.LinuxResources{
			Devices:        []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}},
			Memory:         &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(1 << 20)), Swappiness: ptr(uint64(5))},
			CPU:            &specs.LinuxCPU{Shares: ptr(uint64(512)), Cpus: "0-7", Mems: "1", RealtimePeriod: ptr(uint64(1))},
			BlockIO:        &specs.LinuxBlockIO{Weight: ptr(uint16(5))},
			HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}},
			Unified:        map[string]string{"memory.high": "5", "io.max": "8:0 rbps=1", "memory.swap.max": "0"},
		}
		device("/dev/fuse", "c", 10, 229)(s)
		device("/dev/null", "c", 1, 3)(s)
		s.Linux.Devices[0].FileMode = ptr(os.FileMode(0o4666))
	})
	out, err := testGuest().Container("c", in, false)
	require.NoError(t, err)
	got, err := json.Marshal(out)
	require.NoError(t, err)
	require.JSONEq(t, `{
		"ociVersion": "`+specs.Version+`",
		"process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", "true"], "env": ["PATH=/bin", "HOME=/"], "cwd": "/",
			"rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1024}], "oomScoreAdj": -998},
		"root": {"path": "", "readonly": true},
		"linux": {
			"cgroupsPath": "/pod/c",
			"namespaces": [{"type": "mount"}, {"type": "cgroup"},
				{"type": "ipc", "path": "/ns/ipc"}, {"type": "uts", "path": "/ns/uts"}, {"type": "pid"}],
			"maskedPaths": ["/proc/kcore"],
			"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438}],
			"resources": {
				"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}],
				"memory": {"limit": 1048576}, "cpu": {"shares": 512}, "unified": {"memory.high": "5"}
			}
		}
	}`, string(got))
}

func TestNamespaces(t *testing.T) {
	g := testGuest()
	// Nothing named: the guest's own, but for its processes.
	l, err := g.namespaces(&specs.Linux{})
	require.NoError(t, err)
	require.Equal(t, []specs.LinuxNamespace{
		{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}, {Type: specs.PIDNamespace, Path: "/ns/pid"},
	}, l)
	l, err = g.namespaces(&specs.Linux{Namespaces: []specs.LinuxNamespace{
		{Type: specs.IPCNamespace, Path: "x"}, {Type: specs.UTSNamespace, Path: "x"}, {Type: specs.PIDNamespace},
	}})
	require.NoError(t, err)
	require.Equal(t, []specs.LinuxNamespace{
		{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
		{Type: specs.IPCNamespace, Path: "/ns/ipc"}, {Type: specs.UTSNamespace, Path: "/ns/uts"}, {Type: specs.PIDNamespace},
	}, l)
	g.PID = ""
	_, err = g.namespaces(&specs.Linux{})
	require.ErrorContains(t, err, "the pod has none")

	// A user namespace by path becomes one of the container's own; sysctls of own namespaces are let through.
	spec := testSpec(ns(specs.UserNamespace, "/proc/7/ns/user"), sysctl("kernel.shmmax"))
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	spec.Linux.Namespaces[3].Path, spec.Linux.Namespaces[4].Path = "", ""
	spec.Hostname = "own"
	out, err := g.Container("c", spec, false)
	require.NoError(t, err)
	require.Contains(t, out.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	require.Equal(t, spec.Linux.UIDMappings, out.Linux.UIDMappings)
	require.Equal(t, map[string]string{"kernel.shmmax": "1"}, out.Linux.Sysctl)
	require.Equal(t, "own", out.Hostname)
}

func TestHasCPUs(t *testing.T) {
	g := testGuest()
	for list, want := range map[string]bool{
		"": false, "0": true, "0-1": true, "0,1": true, "2": false, "0-2": false,
		"-1": false, "1-0": false, "x": false, "0,,1": false, "99999999999999999999": false,
	} {
		require.Equal(t, want, g.hasCPUs(list), list)
	}
}

func TestMergeResources(t *testing.T) {
	have := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(1)), Reservation: ptr(int64(2))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(3)), Cpus: "0"},
	}
	got := MergeResources(have, &specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: ptr(int64(9))},
		CPU:     &specs.LinuxCPU{Quota: ptr(int64(8))},
		Pids:    &specs.LinuxPids{Limit: ptr(int64(7))},
		Unified: map[string]string{"memory.high": "1"},
	})
	require.EqualValues(t, 9, *got.Memory.Limit)
	require.EqualValues(t, 2, *got.Memory.Reservation)
	require.EqualValues(t, 3, *got.CPU.Shares)
	require.EqualValues(t, 8, *got.CPU.Quota)
	require.EqualValues(t, 7, *got.Pids.Limit)
	require.Equal(t, "0", got.CPU.Cpus)
	require.EqualValues(t, 1, *have.Memory.Limit, "the old one is untouched")
}

func TestDecodeLimits(t *testing.T) {
	_, err := DecodeContainer([]byte(strings.Repeat(" ", wire.MaxSpec+1)))
	require.ErrorContains(t, err, "the limit is")
	for _, bad := range []string{"", "{", "[]", `{"process":7}`, `{} {}`} {
		_, err := DecodeContainer([]byte(bad))
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", bad, err)
	}
}

// Whatever the host sends, what goes on to libcontainer keeps the allow-list's promises.
func FuzzContainerSpec(f *testing.F) {
	for _, s := range []*specs.Spec{
		testSpec(),
		testSpec(sysctl("net.x"), device("/dev/fuse", "c", 10, 229), unified("memory.max", "1"), ns(specs.UserNamespace, "/x")),
	} {
		raw, err := json.Marshal(s)
		require.NoError(f, err)
		f.Add(raw)
	}
	f.Add([]byte(`{"process":{"args":["a"],"cwd":"/"},"linux":{"resources":{"cpu":{"cpus":"0-99999999"}},"seccomp":{"defaultAction":"X"}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		in, err := DecodeContainer(raw)
		if err != nil {
			return
		}
		out, err := testGuest().Container("c", in, false)
		if err != nil {
			return
		}
		if out.Hooks != nil || len(out.Mounts) != 0 || out.Root.Path != "" || out.Annotations != nil || out.Linux.CgroupsPath != "/pod/c" {
			t.Fatalf("%+v", out)
		}
		for _, n := range out.Linux.Namespaces {
			if n.Type == specs.NetworkNamespace || n.Type == specs.TimeNamespace || n.Path != "" && !strings.HasPrefix(n.Path, "/ns/") {
				t.Fatalf("%+v", n)
			}
		}
		for _, d := range out.Linux.Devices {
			if d.Path != "/dev/fuse" || d.Type != "c" || d.Major != 10 || d.Minor != 229 {
				t.Fatalf("%+v", d)
			}
		}
		LibcontainerProcess(out.Process)
	})
}

func FuzzProcess(f *testing.F) {
	f.Add([]byte(`{"args":["a"],"cwd":"/","consoleSize":{"width":99999999,"height":1},"rlimits":[{"type":"RLIMIT_AS","hard":1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		in, err := DecodeProcess(raw)
		if err != nil {
			return
		}
		out, err := testGuest().Process(in, in.Terminal)
		if err != nil {
			return
		}
		if out.SelinuxLabel != "" || out.ApparmorProfile != "" || *out.OOMScoreAdj < minOOMScoreAdj || *out.OOMScoreAdj > maxOOMScoreAdj {
			t.Fatalf("%+v", out)
		}
		LibcontainerProcess(out)
	})
}

func FuzzResources(f *testing.F) {
	f.Add([]byte(`{"memory":{"limit":-1},"cpu":{"cpus":"0"},"unified":{"cpu.max":"1 2"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		in, err := DecodeResources(raw)
		if err != nil {
			return
		}
		out, err := testGuest().Resources(in)
		if err != nil {
			return
		}
		if len(out.Devices) != 0 || out.BlockIO != nil {
			t.Fatalf("%+v", out)
		}
		MergeResources(&specs.LinuxResources{}, out)
	})
}
