// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bareQEMU is a VM with nothing in it.
type bareQEMU struct {
	path, accelerator, cpu string
	vcpus, memoryMiB       int
	kernel, initrd         string
}

// bareParameters are what a kernel needs to be measured: its console, no chatter on it, and an end.
const bareParameters = "console=ttyS0 quiet panic=-1"

// boot starts the VM and tells how long it took from exec until the empty init had written its first line.
func (q bareQEMU) boot(ctx context.Context, parameters string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	cmd := exec.CommandContext(ctx, q.path, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "q35", "-accel", q.accelerator, "-cpu", q.cpu, "-smp", strconv.Itoa(q.vcpus), "-m", strconv.Itoa(q.memoryMiB),
		"-serial", "stdio", "-kernel", q.kernel, "-initrd", q.initrd, "-append", parameters)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	console, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	var said []byte
	var took time.Duration
	buf := make([]byte, 4096)
	for took == 0 {
		n, err := console.Read(buf)
		said = append(said, buf[:n]...)
		if bytes.Contains(said, []byte(strings.TrimSpace(initMark))) {
			took = time.Since(started)
		} else if err != nil {
			break
		}
	}
	// The guest restarts by itself, which ends QEMU; not all of that needs to be waited for.
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if took == 0 {
		return 0, fmt.Errorf("bare QEMU ended or took longer than %v without a word of its init: %s%s", stepBudget, said, complaints.String())
	}
	return took, nil
}
