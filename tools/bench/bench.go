// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/pvh"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/hypervisor/vmm"
	"github.com/cloister-project/cloister/test/harness"
)

// bench is one run.
type bench struct {
	plan      plan
	artifacts harness.Artifacts
	node      *harness.Node
	tasks     *tasks
	driver    hypervisor.Driver
	// version is what the VMM says of itself.
	version string
	accel   hypervisor.Accelerator
	bare    bareQEMU
	// dir is the node's directory for what is made here.
	dir         string
	guestKernel string
}

// start starts the private containerd and prepares the baselines.
func (b *bench) start(ctx context.Context) (err error) {
	fmt.Println("==> start a private containerd and make the baselines")
	if b.node, err = harness.Start(ctx, harness.Options{Artifacts: b.artifacts}); err != nil {
		return err
	}
	if err := b.node.ImportBasics(ctx); err != nil {
		return err
	}
	b.dir = filepath.Join(b.node.Dir, "bench")
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return err
	}
	if b.tasks, err = dialTasks(b.node.Socket, b.dir); err != nil {
		return err
	}
	if b.driver, err = vmm.New(vmm.Config{Kind: qemu.Kind, Path: b.artifacts.QEMU}); err != nil {
		return err
	}
	can, err := b.driver.Capabilities(ctx)
	if err != nil {
		return err
	}
	b.version = can.Version
	if b.accel, err = b.driver.Accelerator(ctx, hypervisor.AccelAuto); err != nil {
		return err
	}
	// A pod without limits gets the defaults.
	defaults, err := configs.Load(b.node.CloisterConfig)
	if err != nil {
		return err
	}
	b.bare = bareQEMU{
		path: b.artifacts.QEMU, accelerator: string(b.accel), cpu: b.driver.DefaultCPU(b.accel),
		vcpus: defaults.Sizing.DefaultVCPUs, memoryMiB: defaults.Sizing.DefaultMemoryMiB,
		initrd: filepath.Join(b.dir, "empty.img"),
	}
	if b.bare.kernel, err = pvh.Extract(ctx, b.artifacts.Kernel, filepath.Join(b.dir, "kernels")); err != nil {
		return err
	}
	initrd, err := emptyInitrd()
	if err != nil {
		return err
	}
	return os.WriteFile(b.bare.initrd, initrd, 0o600)
}

// close ends everything that start made, in whatever state it is.
func (b *bench) close(ctx context.Context) error {
	var faults []error
	if b.tasks != nil {
		faults = append(faults, b.tasks.conn.Close())
	}
	if b.node != nil {
		faults = append(faults, b.node.Stop(ctx))
	}
	return errors.Join(faults...)
}

// machineFacts says what the run is on. What cannot be read stays empty.
func (b *bench) machineFacts() machine {
	m := machine{CPUs: runtime.NumCPU(), Accelerator: string(b.accel), QEMU: "QEMU " + b.version}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var memory unix.Sysinfo_t
	if unix.Sysinfo(&memory) == nil {
		m.MemoryMiB = int(uint64(memory.Totalram) * uint64(memory.Unit) >> 20)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.HostKernel = unix.ByteSliceToString(u.Release[:])
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(load), " ")
	}
	return m
}

// runPod runs a pod and tells how long the call took.
func (b *bench) runPod(ctx context.Context, handler string) (*harness.Pod, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	started := time.Now()
	pod, err := b.node.CRI().RunPod(ctx, harness.PodSpec{Handler: handler})
	return pod, time.Since(started), err
}

// idle is a container that runs until it is told to end.
func idle(first string) harness.ContainerSpec {
	return harness.ContainerSpec{Script: first + "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"}
}

// runContainer creates and starts a container and tells how long both calls took.
func runContainer(ctx context.Context, pod *harness.Pod, spec harness.ContainerSpec) (*harness.Container, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	started := time.Now()
	c, err := pod.Run(ctx, spec)
	return c, time.Since(started), err
}

// remove removes pods, also after ctx has ended, and adds to err what went wrong.
func remove(ctx context.Context, err *error, pods ...*harness.Pod) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepBudget)
	defer cancel()
	for _, p := range pods {
		if p != nil {
			*err = errors.Join(*err, p.Remove(ctx))
		}
	}
}

// timeline reads the pod's boot timeline: milliseconds by name.
func timeline(ctx context.Context, pod *harness.Pod) (map[string]float64, string, error) {
	_, info, err := pod.Status(ctx)
	if err != nil {
		return nil, "", err
	}
	marks := map[string]float64{}
	for _, pair := range strings.Fields(info["bootTimeline"]) {
		name, value, _ := strings.Cut(pair, "=")
		// Names of the guest's marks have spaces in them; only their last word has the value.
		if ms, err := strconv.ParseFloat(value, 64); err == nil {
			marks[name] = ms
		}
	}
	if marks["ready"] == 0 {
		return nil, "", fmt.Errorf("the pod's boot timeline %q does not say when it was ready", info["bootTimeline"])
	}
	return marks, info["guestKernel"], nil
}

// processOf finds the pod's process whose executable begins with prefix: the pod's id is on its command line.
func (b *bench) processOf(pod *harness.Pod, prefix string) (int, error) {
	pids, err := b.node.Pids(prefix)
	if err != nil {
		return 0, err
	}
	at := slices.IndexFunc(pids, func(pid int) bool {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return strings.Contains(string(line), pod.ID)
	})
	if at < 0 {
		return 0, fmt.Errorf("pod %s has no process %s", pod.ID, prefix)
	}
	return pids[at], nil
}

// memoryOf reads a value of /proc/PID/smaps_rollup, Rss or Pss, in MiB.
func memoryOf(pid int, key string) (float64, error) {
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return kibLine(string(data), key, path)
}

// kibLine finds "KEY: N kB" in a text and returns MiB.
func kibLine(text, key, where string) (float64, error) {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", where, key)
}
