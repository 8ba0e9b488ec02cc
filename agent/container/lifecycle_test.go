// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

func TestRunToTheEnd(t *testing.T) {
	b := newBench(t, false)
	out, errs := b.stream(), b.stream()
	b.run("one", testSpec(script("echo out; echo err >&2; hostname; exit 7")),
		&agentv1.Stdio{Stdout: out.id.String(), Stderr: errs.id.String()})
	require.Equal(t, "out\nthe-pod\n", out.all(t))
	require.Equal(t, "err\n", errs.all(t))
	r := b.wait("one", "")
	require.EqualValues(t, 7, r.GetExitStatus())
	require.EqualValues(t, len("out\nthe-pod\n"), r.GetStdoutBytes())
	require.EqualValues(t, 4, r.GetStderrBytes())
	require.WithinDuration(t, time.Now(), r.GetExitedAt().AsTime(), time.Minute)

	err := b.m.Signal("one", "", uint32(unix.SIGTERM), false)
	require.ErrorContains(t, err, "process already finished")
	require.True(t, errdefs.IsNotFound(err))
	require.True(t, errdefs.IsNotFound(b.m.Signal("one", "", uint32(unix.SIGKILL), true)))
	b.remove("one")
	// The same id, made anew in the living pod.
	b.run("one", testSpec(script("exit 0")), nil)
	require.Zero(t, b.wait("one", "").GetExitStatus())
	b.remove("one")
}

func TestStatesAndErrors(t *testing.T) {
	b := newBench(t, false)
	require.NoError(t, b.create("c", testSpec(script("sleep 1000")), nil))
	require.True(t, errdefs.IsAlreadyExists(b.create("c", testSpec(script("true")), nil)))
	_, err := b.m.Delete(ctx(t), "c", "")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	_, err = b.m.Start(ctx(t), "c", "")
	require.NoError(t, err)
	_, err = b.m.Start(ctx(t), "c", "")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	_, err = b.m.Delete(ctx(t), "c", "")
	require.ErrorContains(t, err, "container is running")
	require.True(t, errdefs.IsFailedPrecondition(b.m.Resume(ctx(t), "c")))
	_, err = b.m.Start(ctx(t), "c", "nope")
	require.True(t, errdefs.IsNotFound(err))
	_, err = b.m.Start(ctx(t), "nope", "")
	require.True(t, errdefs.IsNotFound(err))
	require.True(t, errdefs.IsInvalidArgument(b.m.Signal("c", "", 0, false)))
	require.True(t, errdefs.IsInvalidArgument(b.m.Signal("c", "", 65, false)))
	require.True(t, errdefs.IsInvalidArgument(b.create("../c", testSpec(script("true")), nil)))

	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err = b.m.Wait(short, "c", "")
	require.ErrorIs(t, err, context.DeadlineExceeded)

	require.Len(t, b.pids("c"), 1)
	require.NoError(t, b.m.Signal("c", "", uint32(unix.SIGKILL), false))
	require.EqualValues(t, 137, b.wait("c", "").GetExitStatus())
	require.Empty(t, b.pids("c"))
	b.remove("c")
	_, err = b.m.Delete(ctx(t), "c", "")
	require.True(t, errdefs.IsNotFound(err))
}

func TestKillBeforeStart(t *testing.T) {
	b := newBench(t, false)
	out := b.stream()
	require.NoError(t, b.create("c", testSpec(script("echo never")), &agentv1.Stdio{Stdout: out.id.String()}))
	require.NoError(t, b.m.Signal("c", "", uint32(unix.SIGKILL), false))
	require.EqualValues(t, 137, b.wait("c", "").GetExitStatus())
	_, err := b.m.Start(ctx(t), "c", "")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	b.remove("c")
	require.Empty(t, out.all(t))
}

func TestMissingCommand(t *testing.T) {
	b := newBench(t, false)
	p := script("")
	p.Args = []string{"nosuch"}
	err := b.create("c", testSpec(p), nil)
	require.EqualError(t, err,
		`create container "c": unable to start container process: error during container init: `+
			`exec: "nosuch": executable file not found in $PATH`)
	require.True(t, errdefs.IsInternal(err))
	b.gone("c")
	require.Equal(t, []string{"c"}, b.storage.removed)

	b.run("c", testSpec(script("sleep 1000")), nil)
	err = b.exec("c", "e", p, nil)
	require.EqualError(t, err,
		`start process "e" of container "c": unable to start container process: exec: "nosuch": executable file not found in $PATH`)
	require.EqualValues(t, 255, b.wait("c", "e").GetExitStatus())
	_, err = b.m.Delete(ctx(t), "c", "e")
	require.NoError(t, err)
	b.remove("c")
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	b := newBench(t, false)
	b.storage.fail = errors.New("no such layer")
	out := b.stream()
	err := b.create("c", testSpec(script("true")), &agentv1.Stdio{Stdout: out.id.String()})
	require.ErrorContains(t, err, `create container "c": no such layer`)
	b.gone("c")
	require.Empty(t, out.all(t), "its stream is closed")
	b.storage.fail = nil

	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	err = b.m.Create(cancelled, &agentv1.CreateContainerRequest{ContainerId: "c",
		Spec: []byte(`{"process":{"args":["/bin/sh"],"cwd":"/"},"linux":{"namespaces":[{"type":"pid"}]}}`)})
	require.ErrorIs(t, err, context.Canceled)
	b.gone("c")
	b.run("c", testSpec(script("true")), nil)
	b.wait("c", "")
	b.remove("c")
}

func TestExec(t *testing.T) {
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 1000")), nil)
	in, out := b.stream(), b.stream()
	require.NoError(t, b.exec("c", "e", script("echo $$ started; cat; echo; ls /proc | grep -c '^[0-9]'; exit 3"),
		&agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String()}))
	require.Contains(t, out.until(t, "started\n"), "started")
	_, err := b.m.Delete(ctx(t), "c", "e")
	require.True(t, errdefs.IsFailedPrecondition(err))
	_, err = in.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, in.CloseWrite())
	require.Equal(t, "hello\n", out.until(t, "hello\n"))
	require.EqualValues(t, 3, b.wait("c", "e").GetExitStatus())
	require.True(t, errdefs.IsNotFound(b.m.Signal("c", "e", uint32(unix.SIGKILL), false)))
	_, err = b.m.Delete(ctx(t), "c", "e")
	require.NoError(t, err)
	_, err = b.m.Delete(ctx(t), "c", "e")
	require.True(t, errdefs.IsNotFound(err))

	// The id again; and an exec that is never started does not keep the container.
	require.NoError(t, b.exec("c", "e", script("kill -9 $$"), nil))
	require.EqualValues(t, 137, b.wait("c", "e").GetExitStatus())
	require.NoError(t, b.m.CreateProcess(ctx(t), &agentv1.CreateProcessRequest{ContainerId: "c", ExecId: "idle",
		Process: []byte(`{"args":["/bin/sh"],"cwd":"/"}`)}))
	b.remove("c")
}

func TestNothingOutlivesTheInit(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprintf("sharedPID=%t", shared), func(t *testing.T) {
			b := newBench(t, shared)
			b.run("c", testSpec(script("sleep 1000"), sharePID(shared)), nil)
			for i := range 5 {
				require.NoError(t, b.exec("c", fmt.Sprintf("e%d", i), script("trap '' TERM; sleep 1000 & sleep 1000; true"), nil))
			}
			require.NoError(t, b.m.Signal("c", "", uint32(unix.SIGKILL), false))
			require.EqualValues(t, 137, b.wait("c", "").GetExitStatus())
			for i := range 5 {
				require.EqualValues(t, 137, b.wait("c", fmt.Sprintf("e%d", i)).GetExitStatus())
			}
			b.remove("c")
		})
	}
}

func sharePID(yes bool) func(*specs.Spec) {
	return func(s *specs.Spec) {
		if yes {
			s.Linux.Namespaces[0].Path = "/proc/1/ns/pid"
		}
	}
}

func TestSharedPIDNamespace(t *testing.T) {
	b := newBench(t, true)
	out := b.stream()
	b.run("a", testSpec(script("sleep 1111"), sharePID(true)), nil)
	b.run("b", testSpec(script("ls /proc/1/root/ 2>&1; ls /proc/1/root/../../etc 2>&1; for p in /proc/[0-9]*; do tr '\\0' ' ' < "+
		"$p/cmdline; echo; done; sleep 1000"), sharePID(true)), &agentv1.Stdio{Stdout: out.id.String()})
	got := out.until(t, "sleep 1111")
	require.Contains(t, got, "/pause pause")
	require.Contains(t, got, "etc: ", "PID 1 of the pod gives the guest's root away")
	require.NotContains(t, got, "passwd", "PID 1 of the pod gives the guest's root away")
	require.NoError(t, b.m.Signal("b", "", uint32(unix.SIGKILL), true))
	b.wait("b", "")
	require.NotEmpty(t, b.pids("a"), "all=true stays inside of its container")
	b.remove("b")
	b.remove("a")
}

func TestConfigurePodTwice(t *testing.T) {
	b := newBench(t, false)
	require.True(t, errdefs.IsFailedPrecondition(b.m.ConfigurePod(ctx(t), nil)))
}

func TestPropertiesOfAProcess(t *testing.T) {
	b := newBench(t, false)
	p := script("id -u; id -G; umask; ulimit -n; pwd; grep -e NoNewPrivs -e CapEff -e Seccomp: /proc/self/status; touch /x 2>&1; head -c 3 " +
		"/proc/kcore; mknod /dev/b b 8 0 2>&1; cat /proc/self/oom_score_adj; hostname")
	umask := uint32(0o27)
	p.User = specs.User{UID: 0, GID: 5, AdditionalGids: []uint32{7, 9}, Umask: &umask}
	p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}}
	p.Cwd = "/tmp"
	p.NoNewPrivileges = true
	p.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_KILL"}, Permitted: []string{"CAP_KILL"}}
	adj := 500
	p.OOMScoreAdj = &adj
	out := b.stream()
	spec := testSpec(p, func(s *specs.Spec) {
		s.Root = &specs.Root{Path: "/etc", Readonly: true}
		s.Hostname = "mine"
		s.Linux.Namespaces[4].Path = ""
		s.Linux.MaskedPaths = []string{"/proc/kcore"}
		s.Linux.CgroupsPath = "/../../etc"
	})
	b.run("c", spec, &agentv1.Stdio{Stdout: out.id.String()})
	got := strings.Split(strings.TrimSpace(out.all(t)), "\n")
	require.Equal(t, "0", got[0])
	require.Equal(t, "5 7 9", got[1])
	require.Equal(t, "0027", got[2])
	require.Equal(t, "100", got[3])
	require.Equal(t, "/tmp", got[4])
	text := strings.Join(got[5:], "\n")
	require.Contains(t, text, "CapEff:\t0000000000000020")
	require.Contains(t, text, "NoNewPrivs:\t1")
	require.Contains(t, text, "Read-only file system")
	require.Contains(t, text, "\n500\n")
	require.Contains(t, text, "Operation not permitted")
	require.Equal(t, "mine", got[len(got)-1])
	b.wait("c", "")
	b.remove("c")
}

func TestSeccomp(t *testing.T) {
	b := newBench(t, false)
	out := b.stream()
	spec := testSpec(script("mkdir /tmp/d 2>&1; echo done"), func(s *specs.Spec) {
		errno := uint(unix.ENOTEMPTY)
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64},
			Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &errno}},
		}
	})
	err := b.create("c", spec, &agentv1.Stdio{Stdout: out.id.String()})
	if err != nil && strings.Contains(err.Error(), "seccomp") {
		t.Skip("this binary is built without seccomp: use -tags seccomp")
	}
	require.NoError(t, err)
	_, err = b.m.Start(ctx(t), "c", "")
	require.NoError(t, err)
	require.Contains(t, out.all(t), "Directory not empty")
	b.wait("c", "")
	b.remove("c")
}

func TestContainersDoNotBlockEachOther(t *testing.T) {
	b := newBench(t, false)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprintf("c%d", i)
			b.run(id, testSpec(script("sleep 0.1; exit 5")), nil)
			if s := b.wait(id, "").GetExitStatus(); s != 5 {
				t.Errorf("%s exits with %d", id, s)
			}
			b.remove(id)
		})
	}
	wg.Wait()
}
