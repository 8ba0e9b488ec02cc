// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

const (
	// churnPods are made in all, churnAtOnce of them at a time, unless the environment says otherwise.
	churnPods   = 50
	churnAtOnce = 2
	// churnTolerance is how much memory may be gone in the end: less than the smallest guest keeps resident (90 MiB), so
	// that not one of them can be among it, and more than what a kernel and a containerd vary by (caches of slabs,
	// per-CPU lists, Go's heap).
	churnTolerance = 64 << 20
)

// fate is how a pod of the churn ends.
type fate struct {
	victim string // what is killed: one of the victims
	early  bool   // while the pod is made, and not while its container runs
}

// Victims. The guest's kernel goes with its PID 1, the agent, and the other way round.
const (
	victimNone  = "nobody"
	victimShim  = "shim"
	victimQEMU  = "QEMU"
	victimAgent = "agent"
)

// fates chooses at random; the same seed gives the same.
func fates(random *rand.Rand, n int) []fate {
	all := make([]fate, n)
	for i := range all {
		f := fate{victim: []string{victimNone, victimNone, victimShim, victimQEMU, victimAgent}[random.IntN(5)]}
		// The agent of a guest that boots cannot be reached.
		f.early = f.victim != victimNone && f.victim != victimAgent && random.IntN(3) == 0
		all[i] = f
	}
	return all
}

// Pods are made and removed one after the other, and shims, QEMUs and agents are killed among them. In the end nothing
// is left and the host's memory is where it was.
//
// CLOISTER_CHURN_PODS sets their number, CLOISTER_CHURN_AT_ONCE how many there are at a time, CLOISTER_CHURN_SEED repeats a run
// that failed.
func TestChurn(t *testing.T) {
	pods, atOnce, seed := uint64(churnPods), uint64(churnAtOnce), rand.Uint64()
	for name, value := range map[string]*uint64{
		"CLOISTER_CHURN_PODS": &pods, "CLOISTER_CHURN_AT_ONCE": &atOnce, "CLOISTER_CHURN_SEED": &seed,
	} {
		if text := os.Getenv(name); text != "" {
			number, err := strconv.ParseUint(text, 10, 64)
			require.NoError(t, err, name)
			*value = number
		}
	}
	t.Logf("CLOISTER_CHURN_PODS=%d CLOISTER_CHURN_AT_ONCE=%d CLOISTER_CHURN_SEED=%d", pods, atOnce, seed)

	n := harness.ForTest(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN")})
	require.NoError(t, n.WriteDropIn("churn", "sizing.default_memory_mib = 256\n"))
	ctx := t.Context()
	// The first pod fills what is kept for all: the unpacked image, the layer's image, the kernel, containerd's heap.
	require.NoError(t, churnPod(ctx, n, "churn-first", fate{victim: victimNone}))
	requireNothingLeft(t, n)
	before := readMemory(t, n)

	var group errgroup.Group
	group.SetLimit(int(atOnce))
	for i, f := range fates(rand.New(rand.NewPCG(seed, 0)), int(pods)) {
		group.Go(func() error {
			name := fmt.Sprintf("churn-%d", i)
			err := churnPod(ctx, n, name, f)
			t.Logf("%s: killed: %s, early: %t, error: %v", name, f.victim, f.early, err)
			if err != nil {
				return fmt.Errorf("%s (killed: %s, early: %t): %w", name, f.victim, f.early, err)
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	requireNothingLeft(t, n)

	// Others on the machine may have taken memory meanwhile, for a while: the best of several looks counts.
	var after memory
	settled := func() bool {
		after = readMemory(t, n)
		// What containerd itself has grown by is its own.
		grown := max(0, after.containerd-before.containerd)
		return after.available+grown+churnTolerance >= before.available && after.shared <= before.shared+churnTolerance
	}
	settle, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for !settled() && settle.Err() == nil {
		select {
		case <-settle.Done():
		case <-time.After(time.Second):
		}
	}
	t.Logf("memory before: %v, after: %v", before, after)
	assert.True(t, settled(), "memory of the host: before %v, after %v", before, after)
}

// churnPod makes a pod with a container, uses it, and removes it; somebody is killed meanwhile.
func churnPod(ctx context.Context, n *harness.Node, name string, f fate) (err error) {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	killed := make(chan error, 1)
	if f.early {
		go func() { killed <- killOf(ctx, n, name, f.victim) }()
	}
	pod, err := n.CRI().RunPod(ctx, harness.PodSpec{Name: name, Handler: harness.HandlerCloister, Change: privilegedPod})
	if f.early {
		if err == nil {
			return errors.Join(fmt.Errorf("the pod is there although its %s was killed", f.victim), <-killed, pod.Remove(ctx))
		}
		// containerd may keep what it could not clean up at once; kubelet removes that.
		return errors.Join(<-killed, removeByName(ctx, n, name))
	}
	if err != nil {
		return err
	}
	defer func() {
		if removed := pod.Remove(ctx); removed != nil {
			err = errors.Join(err, fmt.Errorf("removing the pod: %w", removed))
		}
	}()
	c, err := pod.Run(ctx, harness.ContainerSpec{Script: idle, Change: privilegedContainer})
	if err != nil {
		return err
	}
	if got, err := c.Output(ctx, "echo", name); err != nil || got != name {
		return fmt.Errorf("exec printed %q: %w", got, err)
	}
	switch f.victim {
	case victimNone:
		return nil
	case victimAgent:
		if result, err := c.Exec(ctx, "sh", "-c", "echo c > /proc/sysrq-trigger"); err == nil && result.ExitCode != statusKilled {
			return fmt.Errorf("an exec whose guest panicked ended with %+v", result)
		}
	default:
		if err := killOf(ctx, n, name, f.victim); err != nil {
			return err
		}
	}
	status, err := c.Wait(ctx)
	if err != nil {
		return err
	}
	// 255 is containerd's own for a shim that it lost.
	if code := status.GetExitCode(); code != statusKilled && (f.victim != victimShim || code != 255) {
		return fmt.Errorf("the container's exit status is %d (%s)", code, status.GetReason())
	}
	return nil
}

// killOf kills the shim or the QEMU of a pod as soon as there is a QEMU: it is found by its cgroup, which has the pod's
// name, and its parent is the shim.
func killOf(ctx context.Context, n *harness.Node, pod, victim string) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		pids, err := n.Pids("qemu-system")
		if err != nil {
			return err
		}
		for _, pid := range pids {
			groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			if err != nil || !bytes.Contains(groups, []byte("/"+pod+"/")) {
				continue
			}
			if victim == victimShim {
				if pid, err = parentOf(pid); err != nil {
					return err
				}
			}
			return unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no QEMU of pod %s was seen: %w", pod, ctx.Err())
		case <-ticker.C:
		}
	}
}

func parentOf(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "PPid:"); ok {
			parent, err := strconv.Atoi(strings.TrimSpace(rest))
			if err == nil && parent <= 1 {
				err = fmt.Errorf("process %d has lost its parent", pid)
			}
			return parent, err
		}
	}
	return 0, fmt.Errorf("process %d has no PPid", pid)
}

// removeByName removes what containerd knows of a pod that could not be made.
func removeByName(ctx context.Context, n *harness.Node, name string) error {
	cri := n.CRI().Runtime
	list, err := cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range list.GetItems() {
		if p.GetMetadata().GetName() != name {
			continue
		}
		if _, err := cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()}); err != nil {
			return err
		}
		if _, err := cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()}); err != nil {
			return err
		}
	}
	// The pod's cgroup, as kubelet does it.
	groups, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", "*", n.Name, name))
	for _, g := range append(groups, filepath.Join("/sys/fs/cgroup", n.Name, name)) {
		_ = unix.Rmdir(g)
	}
	return err
}

// memory of the host, bytes.
type memory struct {
	available  int // what can be had without swapping, caches included
	shared     int // memory files, such as guests' memory
	containerd int // resident in containerd
}

func (m memory) String() string {
	return fmt.Sprintf("%d MiB available, %d MiB shared, containerd %d MiB", m.available>>20, m.shared>>20, m.containerd>>20)
}

func readMemory(t *testing.T, n *harness.Node) memory {
	t.Helper()
	data, err := os.ReadFile("/proc/meminfo")
	require.NoError(t, err)
	var m memory
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		kib, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch key {
		case "MemAvailable":
			m.available = kib << 10
		case "Shmem":
			m.shared = kib << 10
		}
	}
	pids, err := n.Pids("containerd")
	require.NoError(t, err)
	for _, pid := range pids {
		kib, err := harness.ResidentKiB(pid)
		require.NoError(t, err)
		m.containerd += kib << 10
	}
	return m
}
