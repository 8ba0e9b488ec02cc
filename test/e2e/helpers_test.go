// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// budget is when something that has not happened is taken to never happen. No test asserts a time; this only turns a
// hang into a failure that says what was waited for.
const budget = 3 * time.Minute

// pollInterval is how often a condition is looked at that cannot tell by itself when it comes true.
const pollInterval = 50 * time.Millisecond

// idle is a container's command that does nothing and ends at once with status 0 on SIGTERM.
const idle = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"

// testContext ends with the test, or after the budget.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), budget)
	t.Cleanup(cancel)
	return ctx
}

// cleanup runs something at the test's end, when the test's own context has ended.
func cleanup(t *testing.T, what string, do func(context.Context) error) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), budget)
		defer cancel()
		if err := do(ctx); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
}

// waitFor polls until ok says yes.
func waitFor(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			require.FailNow(t, "it never happened: "+what)
		case <-ticker.C:
		}
	}
}

// runPod makes a pod that is removed when the test ends.
func runPod(t *testing.T, n *harness.Node, spec harness.PodSpec) *harness.Pod {
	t.Helper()
	if spec.Handler == "" {
		spec.Handler = harness.HandlerCloister
	}
	pod, err := n.CRI().RunPod(testContext(t), spec)
	require.NoError(t, err)
	cleanup(t, "removing pod "+pod.Config.GetMetadata().GetName(), pod.Remove)
	return pod
}

// runContainer makes and starts a container; without a command it idles. It is removed when the test ends.
func runContainer(t *testing.T, pod *harness.Pod, spec harness.ContainerSpec) *harness.Container {
	t.Helper()
	if spec.Script == "" && spec.Command == nil {
		spec.Script = idle
	}
	c, err := pod.Run(testContext(t), spec)
	require.NoError(t, err)
	cleanup(t, "removing container "+c.Config.GetMetadata().GetName(), c.Remove)
	return c
}

// output runs a shell script in the container and returns what it prints, without the last newline.
func output(t *testing.T, c *harness.Container, script string) string {
	t.Helper()
	got, err := c.Output(testContext(t), "/bin/sh", "-c", script)
	require.NoError(t, err)
	return got
}

// ended runs a container to its end and returns its last status and what it printed.
func ended(t *testing.T, pod *harness.Pod, spec harness.ContainerSpec) (status *runtimeapi.ContainerStatus, stdout, stderr string) {
	t.Helper()
	ctx := testContext(t)
	c := runContainer(t, pod, spec)
	status, err := c.Wait(ctx)
	require.NoError(t, err)
	stdout, stderr, err = c.Log()
	require.NoError(t, err)
	return status, stdout, stderr
}

// result is the outcome of a command on the host.
type result struct {
	stdout, stderr string
	status         int
}

// run runs a command of the node (n.Ctr(…), n.Nerdctl(…)) to its end.
func run(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	// ctr's own remark on hosts with cgroup v1.
	said := slices.DeleteFunc(strings.SplitAfter(stderr.String(), "\n"), func(l string) bool { return strings.Contains(l, "DEPRECATION") })
	r := result{stdout.String(), strings.Join(said, ""), cmd.ProcessState.ExitCode()}
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		require.NoError(t, err, "%v", cmd.Args)
	}
	return r
}

// succeed runs a command of the node, which must succeed, and returns its output without the last newline.
func succeed(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	r := run(t, cmd)
	require.Zero(t, r.status, "%v\nstdout: %s\nstderr: %s", cmd.Args, r.stdout, r.stderr)
	return strings.TrimSuffix(r.stdout, "\n")
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// sortedLines are the lines of what a program or a terminal printed.
func sortedLines(s string) []string {
	return slices.Sorted(slices.Values(strings.Split(strings.TrimSuffix(strings.ReplaceAll(s, "\r\n", "\n"), "\n"), "\n")))
}

func firstLines(s string, n int) string {
	return strings.Join(strings.SplitN(s, "\n", n+1)[:n], "\n")
}

func lastLine(s string) string { return s[strings.LastIndexByte(s, '\n')+1:] }
