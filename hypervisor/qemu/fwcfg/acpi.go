// SPDX-License-Identifier: Apache-2.0

package fwcfg

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
)

// Items of the device that hold the ACPI tables.
const (
	itemLoader = "etc/table-loader"
	itemRSDP   = "etc/acpi/rsdp"
	itemTables = "etc/acpi/tables"
)

// stopTimeout is for QEMU to end once it is killed.
const stopTimeout = 10 * time.Second

// ACPITables starts binary, a QEMU for x86-64, with the arguments of a machine under emulation, lets its firmware run
// until it takes the ACPI tables, and returns the blobs as the firmware gets them. QEMU makes them at that moment, from the
// addresses that the firmware gave to PCI, so nothing else makes the same ones. The VM does not go on after that. A VM
// whose firmware takes no tables ends with ctx.
//
// Everything in the arguments that makes a machine changes the tables: machine type and options, memory, CPUs, devices and
// their places. The arguments name no file descriptors below 5.
func ACPITables(ctx context.Context, binary string, args ...string) (*hypervisor.ACPITables, error) {
	a, err := acpiTables(ctx, binary, args)
	if err != nil {
		return nil, fmt.Errorf("ACPI tables from %s: %w (the arguments must be of a whole machine that starts under emulation, "+
			"firmware included)", binary, err)
	}
	return a, nil
}

func acpiTables(ctx context.Context, binary string, args []string) (_ *hypervisor.ACPITables, err error) {
	// The parent-death signal follows the thread that started QEMU.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	qtest, qtestFile, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer qtest.Close()
	defer qtestFile.Close()
	control, controlFile, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	defer controlFile.Close()

	cmd := exec.CommandContext(ctx, binary, append(append([]string(nil), args...),
		"-S", "-no-reboot", "-display", "none", "-trace", traceSelect, "-qtest-log", "none",
		"-chardev", "socket,id=acpi-qtest,fd=3", "-qtest", "chardev:acpi-qtest",
		"-chardev", "socket,id=acpi-qmp,fd=4", "-mon", "chardev=acpi-qmp,mode=control")...)
	cmd.ExtraFiles = []*os.File{qtestFile, controlFile}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = stopTimeout
	trace := &traceReader{selected: make(chan struct{}, 1)}
	cmd.Stderr = trace
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	qtestFile.Close()
	controlFile.Close()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		werr := cmd.Wait()
		cancel(fmt.Errorf("QEMU ended (%v): %s: %w", werr, strings.TrimSpace(trace.tail()), errdefs.ErrUnavailable))
	}()
	defer func() {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			<-ctx.Done() // QEMU closed its end, so it is ending; why, says what it prints
		}
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		cancel(nil)
		<-exited
	}()
	// A QEMU that hangs must not hold a read for ever.
	stop := context.AfterFunc(ctx, func() { qtest.Close() })
	defer stop()

	monitor, err := qmp.New(ctx, control, func(qmp.Event) {})
	if err != nil {
		return nil, err
	}
	defer monitor.Close()
	q := &qtestClient{conn: qtest, in: bufio.NewReaderSize(qtest, 64<<10)}
	files, err := q.directory()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{itemLoader, itemRSDP, itemTables} {
		if _, ok := files[name]; !ok {
			return nil, fmt.Errorf("this machine has no %s: %w", name, errdefs.ErrNotFound)
		}
	}
	trace.watch(files[itemTables].key)
	if err := monitor.Execute(ctx, "cont", nil, nil); err != nil {
		return nil, err
	}
	select {
	case <-trace.selected:
	case <-ctx.Done():
		return nil, fmt.Errorf("the firmware took no ACPI tables: %w", context.Cause(ctx))
	}
	if err := monitor.Execute(ctx, "stop", nil, nil); err != nil {
		return nil, err
	}
	// Tables may have grown since the directory was read.
	if files, err = q.directory(); err != nil {
		return nil, err
	}
	var a hypervisor.ACPITables
	for name, blob := range map[string]*[]byte{itemLoader: &a.Loader, itemRSDP: &a.RSDP, itemTables: &a.Tables} {
		if *blob, err = q.read(files[name].key, files[name].size); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return &a, nil
}

func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "qemu"), os.NewFile(uintptr(fds[1]), "qemu")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}
