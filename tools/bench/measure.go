// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/cloister-project/cloister/test/harness"
)

// measureStart measures how long a pod takes to be ready: bare QEMU, Cloister, runc in turns.
func (b *bench) measureStart(ctx context.Context) (_ []row, err error) {
	var (
		plain   = &samples{Name: "bare QEMU", Unit: "ms"}
		same    = &samples{Name: "bare QEMU, Cloister's kernel parameters", Unit: "ms"}
		ready   = &samples{Name: "Start to ready", Unit: "ms"}
		vmm     = &samples{Name: "host's part, before the guest runs", Unit: "ms"}
		wall    = &samples{Name: "RunPodSandbox", Unit: "ms"}
		runc    = &samples{Name: "runc", Unit: "ms"}
		ourArgs string
	)
	// Round 0 is not counted: it fills the caches (kernel unpacked, QEMU probed, images unpacked).
	for i := range b.plan.Rounds + 1 {
		took, err := b.bare.boot(ctx, bareParameters)
		if err != nil {
			return nil, err
		}
		first := i == 0
		if !first {
			plain.add(milliseconds(took))
		}
		pod, took, err := b.runPod(ctx, harness.HandlerCloister)
		if err != nil {
			return nil, err
		}
		marks, kernel, err := timeline(ctx, pod)
		if err == nil && first {
			b.guestKernel = kernel
			ourArgs, err = b.kernelParameters(pod)
		}
		remove(ctx, &err, pod)
		if err != nil {
			return nil, err
		}
		if !first {
			ready.add(marks["ready"])
			vmm.add(marks["vmm"])
			wall.add(milliseconds(took))
		}
		took, err = b.bare.boot(ctx, ourArgs)
		if err != nil {
			return nil, err
		}
		if !first {
			same.add(milliseconds(took))
		}
		pod, took, err = b.runPod(ctx, harness.HandlerRunc)
		if err != nil {
			return nil, err
		}
		remove(ctx, &err, pod)
		if err != nil {
			return nil, err
		}
		if !first {
			runc.add(milliseconds(took))
		}
		fmt.Printf("    round %d: bare %s, ready %s\n", i, plain.text(), ready.text())
	}
	return []row{
		ratioRow("sandbox ready ÷ bare QEMU boot", ready, plain).budgeted(atMost(1.15), atMost(1.35)).
			noted("ready is from the pod's Start in the shim to the end of the guest's configuration; bare QEMU has the parameters `%s`.",
				bareParameters),
		ratioRow("sandbox ready ÷ bare QEMU boot with the same kernel parameters", ready, same).budgeted(atMost(1.15), atMost(1.35)).
			noted("the stricter reading: the parameters that Cloister adds make bare QEMU faster, too. They are `%s`.", ourArgs),
		{What: "of that, the host's part before the guest runs", Ours: vmm, Value: median(vmm.Values), Unit: " ms"},
		ratioRow("RunPodSandbox, CNI and containerd included ÷ runc's", wall, runc),
	}, nil
}

// kernelParameters are those on the command line of the pod's QEMU.
func (b *bench) kernelParameters(pod *harness.Pod) (string, error) {
	pid, err := b.processOf(pod, "qemu-system")
	if err != nil {
		return "", err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(line), "\x00-append\x00")
	parameters, _, ok := strings.Cut(rest, "\x00")
	if !ok {
		return "", fmt.Errorf("QEMU's command line has no kernel parameters: %q", line)
	}
	return parameters, nil
}

// measurePod fills a pod with containers beside one of runc's, and measures memory and exec on the way.
func (b *bench) measurePod(ctx context.Context) (_ []row, err error) {
	var (
		ours  = &samples{Name: "Cloister", Unit: "ms"}
		runc  = &samples{Name: "runc", Unit: "ms"}
		rss   = &samples{Name: "resident", Unit: "MiB"}
		pss   = &samples{Name: "proportional", Unit: "MiB"}
		used  = &samples{Name: "used", Unit: "MiB"}
		kept  = &samples{Name: "kept by the kernel", Unit: "MiB"}
		execs = &samples{Name: "Cloister", Unit: "ms"}
		base  = &samples{Name: "runc", Unit: "ms"}
		pods  [2]*harness.Pod
		first [2]*harness.Container
	)
	defer func() { remove(ctx, &err, pods[:]...) }()
	for i, handler := range []string{harness.HandlerCloister, harness.HandlerRunc} {
		if pods[i], _, err = b.runPod(ctx, handler); err != nil {
			return nil, err
		}
	}
	shim, err := b.processOf(pods[0], "containerd-shim")
	if err != nil {
		return nil, err
	}
	for n := range b.plan.Containers {
		spec := idle("")
		if n == 0 {
			spec = idle("cat /proc/meminfo; echo; ")
		}
		c, took, err := runContainer(ctx, pods[0], spec)
		if err != nil {
			return nil, err
		}
		ours.add(milliseconds(took))
		if n == 0 {
			if err := b.guestMemory(ctx, c, used, kept); err != nil {
				return nil, err
			}
			first[0] = c
		}
		c, took, err = runContainer(ctx, pods[1], idle(""))
		if err != nil {
			return nil, err
		}
		runc.add(milliseconds(took))
		if n == 0 {
			first[1] = c
		}
		r, err := memoryOf(shim, "Rss")
		if err != nil {
			return nil, err
		}
		p, err := memoryOf(shim, "Pss")
		if err != nil {
			return nil, err
		}
		rss.add(r)
		pss.add(p)
	}
	for range b.plan.Execs {
		for i, into := range []*samples{execs, base} {
			took, err := b.tasks.runTrue(ctx, first[i].ID)
			if err != nil {
				return nil, err
			}
			into.add(milliseconds(took))
		}
	}
	at := min(memoryContainers, len(rss.Values)) - 1
	return []row{
		ratioRow("container create+start in a running pod ÷ runc's", ours, runc).
			noted("CRI CreateContainer and StartContainer, the image being unpacked; reported, then lowered."),
		ratioRow("exec of `true`, p50 ÷ runc's", execs, base).
			noted("Exec, Start, Wait and DeleteProcess of containerd's task API, without stdio. The budget, ≤ 1, is for KVM."),
		row{What: fmt.Sprintf("shim's resident memory, one pod, %d containers", at+1), Value: rss.Values[at], Unit: " MiB",
			Note: fmt.Sprintf("Rss of smaps_rollup; the proportional share (Pss) is %.1f MiB.", pss.Values[at])}.
			budgeted(atMost(15), atMost(20)),
		row{What: "guest memory used before the first container", Value: median(used.Values), Unit: " MiB",
			Note: fmt.Sprintf("MemTotal − MemAvailable in the guest, read by the first thing that the first container does, so that the "+
				"container is in it. "+
				"The kernel keeps %.1f MiB of the VM's %d MiB for itself besides (its image and page tables), which MemTotal does not count.",
				median(kept.Values), b.bare.memoryMiB)}.budgeted(atMost(40), nil),
		row{What: "cost of an added container, time: later half ÷ earlier half", Ours: ours, Value: growth(ours.Values),
			Note: fmt.Sprintf("%d containers in one pod, %+.1f ms from one to the next (runc %+.1f ms). Flat is taken as ≤ 1.25.",
				len(ours.Values), slope(ours.Values), slope(runc.Values))}.budgeted(atMost(flat), nil),
		{What: "cost of an added container, shim's memory", Ours: rss, Value: slope(rss.Values), Unit: " MiB"},
	}, nil
}

// flat is how much dearer the later half of a series may be to count as flat.
const flat = 1.25

// guestMemory reads what the first container printed of /proc/meminfo.
func (b *bench) guestMemory(ctx context.Context, c *harness.Container, used, kept *samples) error {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	if err := c.WaitLog(ctx, "\n\n"); err != nil {
		return err
	}
	text, _, err := c.Log()
	if err != nil {
		return err
	}
	total, err := kibLine(text, "MemTotal", "meminfo")
	if err != nil {
		return err
	}
	available, err := kibLine(text, "MemAvailable", "meminfo")
	if err != nil {
		return err
	}
	used.add(total - available)
	kept.add(float64(b.bare.memoryMiB) - total)
	return nil
}

// measureSize adds up the boot files.
func (b *bench) measureSize(context.Context) ([]row, error) {
	var sizes [2]float64
	for i, path := range []string{b.artifacts.Kernel, b.artifacts.Initrd} {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		sizes[i] = float64(info.Size()) / (1 << 20)
	}
	return []row{row{What: "kernel + initrd", Value: sizes[0] + sizes[1], Unit: " MiB",
		Note: fmt.Sprintf("kernel %.1f MiB (bzImage), initrd %.1f MiB, as they are on disk.", sizes[0], sizes[1])}.
		budgeted(atMost(16), atMost(32))}, nil
}

// measurePods adds pods, all of which stay up until the end.
func (b *bench) measurePods(ctx context.Context) (_ []row, err error) {
	var (
		wall = &samples{Name: "RunPodSandbox", Unit: "ms"}
		shim = &samples{Name: "shim", Unit: "MiB"}
		vmm  = &samples{Name: "QEMU", Unit: "MiB"}
		pods []*harness.Pod
	)
	defer func() { remove(ctx, &err, pods...) }()
	for range b.plan.Pods {
		pod, took, err := b.runPod(ctx, harness.HandlerCloister)
		if err != nil {
			return nil, err
		}
		pods = append(pods, pod)
		wall.add(milliseconds(took))
	}
	for _, pod := range pods {
		for prefix, into := range map[string]*samples{"containerd-shim": shim, "qemu-system": vmm} {
			pid, err := b.processOf(pod, prefix)
			if err != nil {
				return nil, err
			}
			pss, err := memoryOf(pid, "Pss")
			if err != nil {
				return nil, err
			}
			into.add(pss)
		}
	}
	return []row{
		row{What: "cost of an added pod, time: later half ÷ earlier half", Ours: wall, Value: growth(wall.Values),
			Note: fmt.Sprintf("%d pods, all of them up; %+.0f ms from one to the next. Flat is taken as ≤ 1.25.", len(wall.Values),
				slope(wall.Values))}.
			budgeted(atMost(flat), nil),
		{What: "memory of a pod without containers, QEMU + shim", Ours: vmm, Value: median(vmm.Values) + median(shim.Values), Unit: " MiB",
			Note: fmt.Sprintf("proportional shares (Pss): QEMU %s with the guest's memory in it, shim %s.", vmm.text(), shim.text())},
	}, nil
}
