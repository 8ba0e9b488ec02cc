// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/internal/guesttest"
	"github.com/cloister-project/cloister/tee/firmware"
)

// These tests boot AMD's firmware under emulation, with the hash table put where QEMU would put it for a real SEV-SNP guest.
// Nothing protects the guest here. What is real is the firmware's verifier: it compares the table with the kernel, initrd
// and command line that it gets from QEMU. CLOISTER_TEST_GUEST is a directory with the guest image (vmlinuz, initrd.img);
// without it, CLOISTER_TEST_KERNEL is booted to testdata/init.
const (
	bootTimeout   = 180 * time.Second // emulation on a busy machine
	agentLine     = "cloister-agent:"
	noBootOption  = "No bootable option was found"
	guestCommands = "console=ttyS0 quiet panic=-1 cloister.tee=snp"
)

// bootFiles is a guest: kernel, initrd and command line.
type bootFiles struct {
	kernel, initrd, parameters string
}

// table is the hash table that is measured for a document with these files.
func (b bootFiles) table(t *testing.T) []byte {
	t.Helper()
	doc := hypervisor.Document{
		CPU: hypervisor.CPU{Model: "EPYC-v4", Count: 1},
		Boot: hypervisor.Boot{Firmware: testFile(t, "CLOISTER_TEST_OVMF_AMDSEV"), Kernel: b.kernel, Initrd: b.initrd,
			Parameters: strings.Fields(b.parameters)},
		Confidential: &hypervisor.Confidential{SNP: &hypervisor.SNP{KernelHashes: true}},
	}
	l, _, err := (&Platform{config: Config{GuestFeatures: 1}}).launch(context.Background(), doc)
	require.NoError(t, err)
	table := l.Hashes.Table()
	return table[:]
}

func guestFiles(t *testing.T) bootFiles {
	t.Helper()
	if dir := os.Getenv("CLOISTER_TEST_GUEST"); dir != "" {
		return bootFiles{filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd.img"), guestCommands}
	}
	kernel := testFile(t, "CLOISTER_TEST_KERNEL")
	return bootFiles{kernel, guesttest.Initrd(t, "amd64", "./testdata/init"), guestCommands}
}

// flipped is a copy of a file with one bit of its middle byte changed.
func flipped(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	raw[len(raw)/2] ^= 1
	copied := filepath.Join(t.TempDir(), filepath.Base(path))
	require.NoError(t, os.WriteFile(copied, raw, 0o600))
	return copied
}

// emulated is a guest on emulated CPUs.
type emulated struct {
	started time.Time
	control *qmp.Client

	mu      sync.Mutex
	console []byte
	changed chan struct{} // closed and made anew with each write
	ended   chan struct{}
}

// Write takes the serial console's bytes.
func (e *emulated) Write(b []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.console = append(e.console, b...)
	close(e.changed)
	e.changed = make(chan struct{})
	return len(b), nil
}

func (e *emulated) text() (string, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return string(e.console), e.changed
}

func (e *emulated) wait(t *testing.T, text string) time.Duration {
	t.Helper()
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	for {
		all, changed := e.text()
		if strings.Contains(all, text) {
			return time.Since(e.started)
		}
		select {
		case <-changed:
		case <-e.ended:
			if all, _ := e.text(); !strings.Contains(all, text) {
				require.Failf(t, "QEMU ended", "waiting for %q on the console:\n%s", text, all)
			}
		case <-timer.C:
			require.Failf(t, "timeout", "waiting for %q on the console:\n%s", text, all)
		}
	}
}

// boot starts a guest with AMD's firmware and a hash table in its memory; nil: none.
func boot(t *testing.T, guest bootFiles, table []byte) *emulated {
	t.Helper()
	binary, image := testFile(t, "CLOISTER_TEST_QEMU"), testFile(t, "CLOISTER_TEST_OVMF_AMDSEV")
	args := []string{"-machine", "q35,accel=tcg", "-cpu", "max", "-m", "1024", "-nodefaults", "-no-user-config", "-display", "none",
		"-no-reboot",
		"-bios", image, "-kernel", guest.kernel, "-initrd", guest.initrd, "-append", guest.parameters,
		"-serial", "stdio", "-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control"}
	if table != nil {
		parsed, err := firmware.Parse(ovmf(t, "CLOISTER_TEST_OVMF_AMDSEV"))
		require.NoError(t, err)
		file := filepath.Join(t.TempDir(), "table")
		require.NoError(t, os.WriteFile(file, table, 0o600))
		args = append(args, "-device", fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", file, parsed.HashTable.Base))
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	ours, theirs := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	require.NoError(t, err)

	e := &emulated{started: time.Now(), changed: make(chan struct{}), ended: make(chan struct{})}
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	require.NoError(t, err)
	defer stderr.Close()
	said := func() string {
		b, err := os.ReadFile(stderr.Name())
		return fmt.Sprintf("QEMU: %s (%v)", b, err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = e, stderr, []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start())
	go func() {
		defer close(e.ended)
		_ = cmd.Wait() // how it ends is seen on the console
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-e.ended
		if t.Failed() {
			t.Log(said())
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	e.control, err = qmp.New(ctx, conn, func(qmp.Event) {})
	if err != nil {
		require.NoError(t, err, said())
	}
	t.Cleanup(func() { _ = e.control.Close() })
	return e
}

var (
	instruction = regexp.MustCompile(`[ER]IP=([0-9a-f]+)`)
	halted      = regexp.MustCompile(`HLT=([01])`)
)

// waitDeadLoop waits until the CPU runs in a circle of a few instructions, without waiting for an interrupt: that is how
// this firmware ends when a hash does not match (edk2's CpuDeadLoop); it prints nothing.
func (e *emulated) waitDeadLoop(t *testing.T) time.Duration {
	t.Helper()
	const samples, circle = 60, 32
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	var last []uint64
	for len(last) < samples || slices.Max(last)-slices.Min(last) > circle {
		select {
		case <-ticker.C:
		case <-e.ended:
			require.Fail(t, "QEMU ended instead of refusing to boot")
		}
		var registers string
		require.NoError(t, e.control.Execute(ctx, "human-monitor-command", map[string]any{"command-line": "info registers"}, &registers))
		at, halt := instruction.FindStringSubmatch(registers), halted.FindStringSubmatch(registers)
		require.NotNil(t, at, registers)
		require.NotNil(t, halt, registers)
		rip, err := strconv.ParseUint(at[1], 16, 64)
		require.NoError(t, err)
		if halt[1] == "1" {
			last = nil
			continue
		}
		if last = append(last, rip); len(last) > samples {
			last = last[1:]
		}
	}
	return time.Since(e.started)
}

func TestTheFirmwareBootsWhatTheTableSays(t *testing.T) {
	guest := guestFiles(t)
	e := boot(t, guest, guest.table(t))
	took := e.wait(t, agentLine)
	_, digest, err := firmware.ReadFile(os.Getenv("CLOISTER_TEST_OVMF_AMDSEV"), firmware.MaxSize)
	require.NoError(t, err)
	t.Logf("firmware with SHA-256 %s booted to the agent in %.1f s", digest, took.Seconds())
}

func TestTheFirmwareRefusesWhatTheTableDoesNotSay(t *testing.T) {
	guest := guestFiles(t)
	for _, tt := range []struct {
		name   string
		change func(*bootFiles)
	}{
		{"another kernel", func(b *bootFiles) { b.kernel = flipped(t, b.kernel) }},
		{"another initrd", func(b *bootFiles) { b.initrd = flipped(t, b.initrd) }},
		{"another command line", func(b *bootFiles) { b.parameters = strings.Replace(b.parameters, "panic=-1", "panic=-2", 1) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			changed := guest
			tt.change(&changed)
			e := boot(t, changed, guest.table(t))
			took := e.waitDeadLoop(t)
			console, _ := e.text()
			require.NotContains(t, console, agentLine)
			require.NotContains(t, console, "Linux version")
			require.NotContains(t, console, noBootOption, "this is said without a table, not with a wrong one")
			t.Logf("the firmware stopped after %.1f s", took.Seconds())
		})
	}

	// It was the table that did not fit, not what the tests above made of the guest.
	t.Run("the same command line with its own table boots", func(t *testing.T) {
		changed := guest
		changed.parameters = strings.Replace(guest.parameters, "panic=-1", "panic=-2", 1)
		boot(t, changed, changed.table(t)).wait(t, agentLine)
	})
}

func TestTheFirmwareWithoutATableBootsNothing(t *testing.T) {
	e := boot(t, guestFiles(t), nil)
	e.wait(t, noBootOption)
	console, _ := e.text()
	require.NotContains(t, console, agentLine)
}
