// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/test/harness"
)

// A guest that does not come up fails the pod with the reason, in the guest's own words where it has any.
func TestFaultsOfTheGuestsBoot(t *testing.T) {
	n := sharedNode(t)
	faulty := faultyInitrd(t, n)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte("this is no initrd\n"), 0o600))
	with := func(fault string) string {
		return fmt.Sprintf("[hypervisor]\ninitrd = %q\nkernel_params = ['e2e.fault=%s']\n", faulty, fault)
	}
	for _, c := range []struct {
		name, settings string
		want           []string
	}{
		{"initrd is a text", fmt.Sprintf("hypervisor.initrd = %q", text), []string{"Kernel panic", "Unable to mount root fs"}},
		{"init exits: kernel panic", with("exit"), []string{"Kernel panic", "Attempted to kill init", "faultyagent: cannot go on: told to exit"}},
		{"agent never gets ready", with("sleep") + "[timeouts]\nboot = '20s'\n",
			[]string{"not ready after 20s", "timeouts.boot", "console", "faultyagent: fault sleep"}},
		{"agent of another protocol version", with("other-protocol"), []string{"protocol", "99.0", "from-the-future", "same release"}},
		{"agent speaks no protocol", with("garbage"), []string{"hello", "over the limit"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			withSettings(t, n, c.settings)
			requireNoPod(t, n, harness.PodSpec{}, c.want...)
		})
	}
}

// The agent is PID 1: its end is the kernel's, and so the pod's.
func TestAgentEnds(t *testing.T) {
	n := sharedNode(t)
	withSettings(t, n, fmt.Sprintf("[hypervisor]\ninitrd = %q\nkernel_params = ['e2e.fault=exit-later']\n", faultyInitrd(t, n)))
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{})
	ctx := testContext(t)
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	conn, err := n.Dial(ctx, "tcp", net.JoinHostPort(status.GetNetwork().GetIp(), "7"))
	require.NoError(t, err)
	defer conn.Close()
	requireKilled(t, c)
	requireLost(t, pod, "Attempted to kill init", "faultyagent: told to exit")
	removeAll(t, n, pod)
}

// A guest that is told to power off and does not is killed when timeouts.stop is over.
func TestGuestDoesNotPowerOff(t *testing.T) {
	n := sharedNode(t)
	withSettings(t, n, fmt.Sprintf("[hypervisor]\ninitrd = %q\nkernel_params = ['e2e.fault=stays-up']\n[timeouts]\nstop = '3s'\n",
		faultyInitrd(t, n)))
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{})
	require.NoError(t, pod.Stop(testContext(t)))
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.NotZero(t, status.GetFinishedAt())
	removeAll(t, n, pod)
}

// The kernel of a running guest panics.
func TestGuestPanics(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{Change: privilegedPod})
	bystander := runContainer(t, pod, harness.ContainerSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{
		Script: "echo c > /proc/sysrq-trigger; sleep 3600", Change: privilegedContainer,
	})
	requireKilled(t, c)
	requireKilled(t, bystander)
	requireLost(t, pod, "Kernel panic", "sysrq")
	// What is asked of the pod now is refused with the same reason.
	_, err := pod.Create(testContext(t), harness.ContainerSpec{})
	t.Logf("the error: %v", err)
	require.Error(t, err)
	removeAll(t, n, pod)
}
