// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/hooks"
)

// sh is a hook that runs a shell script, in the container's bundle.
func sh(script string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script}}
}

func withHooks(h *specs.Hooks) *specs.Spec {
	return &specs.Spec{Hooks: h, Annotations: map[string]string{"a": "b"}}
}

func words(t *testing.T, c *Container) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.bundle, "words"))
	if !errors.Is(err, os.ErrNotExist) {
		require.NoError(t, err)
	}
	return string(b)
}

func TestPoststartHooks(t *testing.T) {
	agent := &scriptedAgent{}
	c := fakeContainer(t, agent, withHooks(&specs.Hooks{
		CreateRuntime: []specs.Hook{sh("echo create >> words")},
		Poststart: []specs.Hook{
			sh("cat > state; echo one >> words"), sh("echo two >> words; exit 3"), {Path: "/no/such/hook"}, sh("echo three >> words"),
		},
		Poststop: []specs.Hook{sh("echo stop >> words")},
	}))
	require.NoError(t, c.init.Start(t.Context()), "failures are logged")
	require.Equal(t, "one\ntwo\nthree\n", words(t, c), "they have run when Start returns")
	b, err := os.ReadFile(filepath.Join(c.bundle, "state"))
	require.NoError(t, err)
	var state specs.State
	require.NoError(t, json.Unmarshal(b, &state))
	require.Equal(t, specs.State{
		Version: specs.Version, ID: "c", Status: specs.StateRunning, Pid: int(c.pid()), Bundle: c.bundle,
		Annotations: map[string]string{"a": "b"},
	}, state)

	require.Error(t, c.init.Start(t.Context()), "it runs")
	require.NoError(t, c.fakeExec(t, "x").Start(t.Context()))
	require.Equal(t, "one\ntwo\nthree\n", words(t, c), "once for each container")
	agent.exit("x") <- 0
	agent.exit("") <- 0
}

func TestNoPoststartHooksWithoutAStart(t *testing.T) {
	agent := &scriptedAgent{start: errors.New("no such file")}
	c := fakeContainer(t, agent, withHooks(&specs.Hooks{Poststart: []specs.Hook{sh("echo one >> words")}}))
	require.Error(t, c.init.Start(t.Context()))
	require.Empty(t, words(t, c))
	agent.start = nil
	require.NoError(t, c.init.Start(t.Context()), "it may be tried again")
	require.Equal(t, "one\n", words(t, c))
}

// A container that has ended has been started: its hooks run to their end, without its exit being held back from others.
func TestPoststartHooksOfAContainerThatEnds(t *testing.T) {
	agent := &scriptedAgent{}
	c := fakeContainer(t, agent, withHooks(&specs.Hooks{Poststart: []specs.Hook{sh("echo begun > begun; read x < go; echo end >> words")}}))
	gate := filepath.Join(c.bundle, "go")
	require.NoError(t, unix.Mkfifo(gate, 0o600))
	started := make(chan error, 1)
	go func() { started <- c.init.Start(t.Context()) }()
	awaitFile(t, filepath.Join(c.bundle, "begun"))
	agent.exit("") <- 5
	exit, err := c.init.Wait(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 5, exit.Status)
	require.NoError(t, os.WriteFile(gate, []byte("go\n"), 0))
	require.NoError(t, <-started)
	require.Equal(t, "end\n", words(t, c))
}

// A hook that hangs ends with the call, with the pod, or with the container, and before what is run after it.
func TestPoststartHookThatHangs(t *testing.T) {
	for name, end := range map[string]func(c *Container, call context.CancelFunc){
		"the caller leaves": func(_ *Container, call context.CancelFunc) { call() },
		"the pod ends":      func(c *Container, _ context.CancelFunc) { c.pod.endLife() },
		"it is deleted":     func(c *Container, _ context.CancelFunc) { _, _ = c.Delete(context.Background()) },
		"the VM is lost":    func(c *Container, _ context.CancelFunc) { c.abandon(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			agent := &scriptedAgent{}
			h := &specs.Hooks{
				Poststart: []specs.Hook{sh("echo begun > begun; exec sleep 600"), sh("echo next >> words")},
				Poststop:  []specs.Hook{sh("echo stop >> words")},
			}
			c := fakeContainer(t, agent, withHooks(h))
			c.cleanup.add(func(ctx context.Context) { hooks.Poststop(ctx, h, hookState("c", c.bundle, 0, nil)) })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			started := make(chan error, 1)
			go func() { started <- c.init.Start(ctx) }()
			awaitFile(t, filepath.Join(c.bundle, "begun"))
			if name == "it is deleted" {
				agent.exit("") <- 0
				_, err := c.init.Wait(t.Context())
				require.NoError(t, err)
			}
			end(c, cancel)
			require.NoError(t, <-started)
			c.release(t.Context())
			require.Equal(t, "stop\n", words(t, c))
		})
	}
}

func TestNoPoststartHooksBehindTheEnd(t *testing.T) {
	c := fakeContainer(t, &scriptedAgent{}, withHooks(&specs.Hooks{Poststart: []specs.Hook{sh("echo one >> words")}}))
	c.release(t.Context())
	require.NoError(t, c.init.Start(t.Context()))
	require.Empty(t, words(t, c))
}

func awaitFile(t *testing.T, path string) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, err := os.Stat(path)
		return err == nil
	}, 30*time.Second, time.Millisecond)
}
