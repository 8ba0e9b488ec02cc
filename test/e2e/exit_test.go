// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// checkExitCodes is about how processes end, and about what is said of those that cannot begin: status and words are
// runc's, which people and their tools know.
func checkExitCodes(t *testing.T, pod *harness.Pod) {
	t.Run("init", func(t *testing.T) {
		for _, c := range []struct {
			name, script string
			status       int32
			reason       string
		}{
			{"success", "exit 0", 0, "Completed"},
			{"failure", "exit 1", 1, "Error"},
			{"status 42", "exit 42", 42, "Error"},
			{"shell finds no command", "no-such-command", 127, "Error"},
			{"shell may not execute", "/etc/passwd", 126, "Error"},
			{"status 255", "exit 255", 255, "Error"},
		} {
			t.Run(c.name, func(t *testing.T) {
				status, _, _ := ended(t, pod, harness.ContainerSpec{Script: c.script})
				assert.Equal(t, c.status, status.GetExitCode())
				assert.Equal(t, c.reason, status.GetReason())
				assert.Greater(t, status.GetFinishedAt(), status.GetCreatedAt())
				assert.LessOrEqual(t, status.GetFinishedAt(), time.Now().UnixNano())
			})
		}
	})
	t.Run("stopped", func(t *testing.T) { checkStops(t, pod) })
	t.Run("cannot begin", func(t *testing.T) { checkCannotBegin(t, pod) })
	t.Run("exec", func(t *testing.T) { checkExecExits(t, pod) })
}

func checkStops(t *testing.T, pod *harness.Pod) {
	for _, c := range []struct {
		name, script string
		grace        time.Duration
		status       int32
	}{
		{"obeys", "trap 'exit 9' TERM; echo ready; while :; do usleep 20000; done", budget, 9},
		{"is killed", "trap '' TERM; echo ready; while :; do usleep 20000; done", time.Second, 137},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := testContext(t)
			container := runContainer(t, pod, harness.ContainerSpec{Script: c.script})
			require.NoError(t, container.WaitLog(ctx, "ready\n"))
			require.NoError(t, container.Stop(ctx, c.grace))
			status, err := container.Wait(ctx)
			require.NoError(t, err)
			assert.Equal(t, c.status, status.GetExitCode())
			require.NoError(t, container.Stop(ctx, c.grace), "it may be repeated")
		})
	}
}

func checkCannotBegin(t *testing.T, pod *harness.Pod) {
	for _, c := range []struct {
		name string
		spec harness.ContainerSpec
		text string
	}{
		{"not in PATH", harness.ContainerSpec{Command: []string{"no-such-command"}},
			`exec: "no-such-command": executable file not found in $PATH`},
		{"no such path", harness.ContainerSpec{Command: []string{"/no/such"}}, `exec: "/no/such": stat /no/such: no such file or directory`},
		{"not executable", harness.ContainerSpec{Command: []string{"/etc/passwd"}}, `exec: "/etc/passwd": permission denied`},
		{"a directory", harness.ContainerSpec{Command: []string{"/etc"}}, `exec: "/etc": is a directory`},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := testContext(t)
			container, err := pod.Create(ctx, c.spec)
			require.NoError(t, err)
			cleanup(t, "removing the container", container.Remove)
			err = container.Start(ctx)
			require.ErrorContains(t, err, c.text)
			assert.NotContains(t, err.Error(), "\n")
			status, err := container.Status(ctx)
			require.NoError(t, err)
			assert.Equal(t, runtimeapi.ContainerState_CONTAINER_EXITED, status.GetState())
			assert.EqualValues(t, 128, status.GetExitCode(), "CRI's word for a container that did not begin")
			assert.Equal(t, "StartError", status.GetReason())
			assert.Contains(t, status.GetMessage(), c.text)
		})
	}
}

func checkExecExits(t *testing.T, pod *harness.Pod) {
	container := runContainer(t, pod, harness.ContainerSpec{})
	for _, c := range []struct {
		script string
		status int32
	}{
		{"exit 0", 0}, {"exit 1", 1}, {"exit 42", 42}, {"no-such-command", 127}, {"/etc/passwd", 126},
		{"kill -KILL $$", 137}, {"kill -TERM $$", 143}, {"kill -INT $$", 130}, {"kill -SEGV $$", 139},
	} {
		t.Run(c.script, func(t *testing.T) {
			result, err := container.Exec(testContext(t), "sh", "-c", c.script)
			require.NoError(t, err)
			assert.Equal(t, c.status, result.ExitCode)
		})
	}
	for _, c := range []struct{ command, text string }{
		{"no-such-command", `exec: "no-such-command": executable file not found in $PATH`},
		{"/etc/passwd", `exec: "/etc/passwd": permission denied`},
	} {
		t.Run(c.command, func(t *testing.T) {
			_, err := container.Exec(testContext(t), c.command)
			require.ErrorContains(t, err, c.text)
		})
	}
	status, err := container.Status(testContext(t))
	require.NoError(t, err)
	assert.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, status.GetState(), "none of it touched the container")
}
