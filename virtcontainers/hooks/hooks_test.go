// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 deprecated prestart hooks are still supported, and tested

package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/procid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sh is a hook that runs a shell script.
func sh(script string, args ...string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: append([]string{"hook", "-c", script, "hook"}, args...)}
}

func state(t *testing.T) specs.State {
	return specs.State{Version: specs.Version, ID: "c1", Status: specs.StateStopped, Pid: 42, Bundle: t.TempDir(),
		Annotations: map[string]string{"a": "b"}}
}

func seconds(n int) *int { return &n }

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(data)
}

func TestCreateRuntime(t *testing.T) {
	s := state(t)
	t.Setenv("INHERITED", "yes")
	withEnv := sh(`echo "$0 $1 $X ${INHERITED-unset}" >> order`, "arg")
	withEnv.Env = []string{"X=1", "PATH=/usr/bin:/bin"}
	h := &specs.Hooks{
		CreateRuntime: []specs.Hook{sh(`cat > state.json; pwd > dir; echo second >> order`), withEnv},
		Prestart:      []specs.Hook{sh(`echo "first ${INHERITED}" >> order`)},
		Poststop:      []specs.Hook{sh(`echo never >> order`)},
	}
	require.NoError(t, Validate(h))
	require.NoError(t, CreateRuntime(context.Background(), h, s))
	assert.Equal(t, "first yes\nsecond\nhook arg 1 unset\n", read(t, filepath.Join(s.Bundle, "order")))
	assert.Equal(t, s.Bundle+"\n", read(t, filepath.Join(s.Bundle, "dir")))
	var got map[string]any
	require.NoError(t, json.Unmarshal([]byte(read(t, filepath.Join(s.Bundle, "state.json"))), &got))
	assert.Equal(t, map[string]any{"ociVersion": specs.Version, "id": "c1", "status": "creating", "pid": 42.0,
		"bundle": s.Bundle, "annotations": map[string]any{"a": "b"}}, got)
	assert.NoError(t, CreateRuntime(context.Background(), nil, s))
}

// A hook need not read its input, nor be quick about it.
func TestLargeStateUnread(t *testing.T) {
	s := state(t)
	s.Annotations["big"] = strings.Repeat("x", 1<<20)
	require.NoError(t, CreateRuntime(context.Background(), &specs.Hooks{CreateRuntime: []specs.Hook{sh("exit 0")}}, s))
	require.NoError(t, CreateRuntime(context.Background(), &specs.Hooks{CreateRuntime: []specs.Hook{sh("wc -c > size")}}, s))
	n, err := strconv.Atoi(strings.TrimSpace(read(t, filepath.Join(s.Bundle, "size"))))
	require.NoError(t, err)
	assert.Greater(t, n, 1<<20)
}

func TestCreateRuntimeFails(t *testing.T) {
	notExecutable := filepath.Join(t.TempDir(), "plain")
	require.NoError(t, os.WriteFile(notExecutable, []byte("x"), 0o644))
	for _, tc := range []struct {
		name  string
		hook  specs.Hook
		texts []string
		is    error
	}{
		{"status", sh("echo out; echo boom >&2; exit 3"), []string{"createRuntime[1] /bin/sh", "exit status 3", `it wrote: "boom"`}, nil},
		{"output only", sh("echo out; exit 1"), []string{`it wrote: "out"`}, nil},
		{"signal", sh("kill -9 $$"), []string{"signal: killed"}, nil},
		{"missing", specs.Hook{Path: "/no/such/hook"}, []string{"/no/such/hook", "no such file"}, os.ErrNotExist},
		{"not executable", specs.Hook{Path: notExecutable}, []string{"permission denied"}, os.ErrPermission},
		{"time limit", specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo slow >&2; sleep 100"}, Timeout: seconds(1)},
			[]string{"time limit of 1 s", "slow"}, context.DeadlineExceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := state(t)
			h := &specs.Hooks{CreateRuntime: []specs.Hook{sh("exit 0"), tc.hook, sh("touch after")}}
			err := CreateRuntime(context.Background(), h, s)
			var he *Error
			require.ErrorAs(t, err, &he)
			assert.Equal(t, 1, he.Index)
			for _, text := range tc.texts {
				assert.Contains(t, err.Error(), text)
			}
			if tc.is != nil {
				assert.ErrorIs(t, err, tc.is)
			}
			assert.NoFileExists(t, filepath.Join(s.Bundle, "after"), "the failure ends the phase")
		})
	}
	s := state(t)
	err := CreateRuntime(context.Background(), &specs.Hooks{Prestart: []specs.Hook{sh("exit 5")},
		CreateRuntime: []specs.Hook{sh("touch after")}}, s)
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	assert.Equal(t, 5, exit.ExitCode())
	assert.Contains(t, err.Error(), "prestart[0]")
	assert.NoFileExists(t, filepath.Join(s.Bundle, "after"))
}

func TestOutputIsBounded(t *testing.T) {
	s := state(t)
	err := CreateRuntime(context.Background(), &specs.Hooks{CreateRuntime: []specs.Hook{
		sh(`i=0; while [ $i -lt 3000 ]; do echo "line $i" >&2; i=$((i+1)); done; printf 'end\377' >&2; exit 1`)}}, s)
	var he *Error
	require.ErrorAs(t, err, &he)
	assert.LessOrEqual(t, len(he.Output), tailBytes+2)
	assert.True(t, strings.HasSuffix(he.Output, "line 2999\nend�"), "%q", he.Output[len(he.Output)-20:])
}

func TestTail(t *testing.T) {
	var w tail
	var all []byte
	for i := range 3000 {
		p := bytes.Repeat([]byte{byte('a' + i%26)}, i%37)
		if i%500 == 499 {
			p = bytes.Repeat([]byte{'Z'}, tailBytes+i)
		}
		all = append(all, p...)
		n, err := w.Write(p)
		require.NoError(t, err)
		require.Equal(t, len(p), n)
		require.Equal(t, string(all[max(0, len(all)-tailBytes):]), string(w.buf))
	}
}

func pidsIn(t *testing.T, path string) []int {
	t.Helper()
	var pids []int
	for _, f := range strings.Fields(read(t, path)) {
		n, err := strconv.Atoi(f)
		require.NoError(t, err)
		pids = append(pids, n)
	}
	return pids
}

// The whole group goes, and as a subreaper, which the shim is, we keep no zombies.
func TestGroupIsKilled(t *testing.T) {
	require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	const script = `sleep 100 & echo $! > pids; (sleep 100 & echo $! >> pids; wait) & echo $! >> pids; echo $$ >> pids; echo x > ready; wait`
	for _, how := range []string{"time limit", "context"} {
		t.Run(how, func(t *testing.T) {
			s := state(t)
			hook := sh(script)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if how == "time limit" {
				hook.Timeout = seconds(1)
			} else {
				fifo := filepath.Join(s.Bundle, "ready")
				require.NoError(t, unix.Mkfifo(fifo, 0o600))
				go func() {
					os.ReadFile(fifo) // until the hook wrote to it
					cancel()
				}()
			}
			err := CreateRuntime(ctx, &specs.Hooks{CreateRuntime: []specs.Hook{hook}}, s)
			if how == "context" {
				assert.ErrorIs(t, err, context.Canceled)
			} else {
				assert.ErrorIs(t, err, context.DeadlineExceeded)
			}
			for _, pid := range pidsIn(t, filepath.Join(s.Bundle, "pids")) {
				assert.False(t, procid.Alive(pid), pid)
				assert.ErrorIs(t, unix.Kill(pid, 0), unix.ESRCH, "a zombie of ours")
			}
		})
	}
}

// A daemon that a hook starts holds the hook's output open; the hook has ended all the same, and the daemon lives.
func TestDaemonDoesNotBlock(t *testing.T) {
	s := state(t)
	start := time.Now()
	require.NoError(t, CreateRuntime(context.Background(), &specs.Hooks{CreateRuntime: []specs.Hook{sh(`sleep 100 & echo $! > pid`)}}, s))
	assert.Less(t, time.Since(start), 20*time.Second)
	pid := pidsIn(t, filepath.Join(s.Bundle, "pid"))[0]
	assert.True(t, procid.Alive(pid))
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
}

func TestPostHooksGoOn(t *testing.T) {
	var logged bytes.Buffer
	l := logrus.New()
	l.SetOutput(&logged)
	ctx := log.WithLogger(context.Background(), logrus.NewEntry(l))
	for _, tc := range []struct {
		status string
		run    func(s specs.State, hooks []specs.Hook)
	}{
		{"running", func(s specs.State, hooks []specs.Hook) { Poststart(ctx, &specs.Hooks{Poststart: hooks}, s) }},
		{"stopped", func(s specs.State, hooks []specs.Hook) { Poststop(ctx, &specs.Hooks{Poststop: hooks}, s) }},
	} {
		logged.Reset()
		s := state(t)
		tc.run(s, []specs.Hook{sh("echo sad >&2; exit 1"), {Path: "/no/such/hook"}, sh("cat > state.json")})
		assert.Contains(t, read(t, filepath.Join(s.Bundle, "state.json")), `"status":"`+tc.status+`"`)
		assert.Contains(t, logged.String(), "sad")
		assert.Contains(t, logged.String(), "/no/such/hook")
	}
	Poststart(ctx, nil, state(t))
	Poststop(ctx, nil, state(t))
}

func TestValidate(t *testing.T) {
	require.NoError(t, Validate(nil))
	require.NoError(t, Validate(&specs.Hooks{}))

	err := Validate(&specs.Hooks{
		CreateRuntime:   []specs.Hook{{Path: "/ok"}},
		CreateContainer: []specs.Hook{{Path: "/a"}, {Path: "/b"}},
		StartContainer:  []specs.Hook{{Path: "/c"}},
	})
	var u *UnsupportedError
	require.ErrorAs(t, err, &u)
	assert.True(t, errdefs.IsNotImplemented(err))
	assert.Equal(t, []string{"createContainer[0] /a", "createContainer[1] /b", "startContainer[0] /c"}, u.Hooks)

	err = Validate(&specs.Hooks{
		Prestart: []specs.Hook{{Path: "relative"}},
		Poststop: []specs.Hook{{Path: "/x", Timeout: seconds(0)}, {Path: "/y", Timeout: seconds(-3)}, {}},
	})
	assert.True(t, errdefs.IsInvalidArgument(err))
	for _, text := range []string{`prestart[0]: path "relative"`, "poststop[0] /x: timeout 0", "poststop[1] /y: timeout -3",
		`poststop[2]: path ""`} {
		assert.Contains(t, err.Error(), text)
	}
	assert.True(t, errdefs.IsInvalidArgument(Validate(&specs.Hooks{Poststart: make([]specs.Hook, maxHooks+1)})))
}

func TestErrorWrapsExit(t *testing.T) {
	err := CreateRuntime(context.Background(), &specs.Hooks{CreateRuntime: []specs.Hook{sh("exit 7")}}, state(t))
	var exit *exec.ExitError
	require.True(t, errors.As(err, &exit))
	assert.Equal(t, 7, exit.ExitCode())
}
