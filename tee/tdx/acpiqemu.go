// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
)

// The firmware configuration device: QEMU docs/specs/fw_cfg.rst. The protocol of -qtest: comment at the head of QEMU's
// softmmu/qtest.c.
const (
	fwcfgDirectory  = 0x19
	fwcfgDMA        = 0x514
	fwcfgSelectRead = 0x08 | 0x02
	fwcfgNameSize   = 56
	fwcfgEntrySize  = 8 + fwcfgNameSize
	fwcfgMaxFiles   = 4096
	guestDescriptor = 0x100000 // guest memory that may be overwritten: the VM never goes on
	guestBuffer     = 0x200000
	descriptorSize  = 16
	traceSelect     = "fw_cfg_select"
	qtestLineMax    = 2*maxACPI + 64
	stderrTail      = 4096
	stopTimeout     = 10 * time.Second
	fileACPILoader  = "etc/table-loader"
	fileACPIRSDP    = "etc/acpi/rsdp"
	fileACPITables  = "etc/acpi/tables"
)

var selectLine = regexp.MustCompile(`^fw_cfg_select 0x[0-9a-f]+ key 0x([0-9a-f]+) `)

// ACPIFromQEMU starts binary, a QEMU for x86-64, with the arguments of a machine under emulation, lets its firmware run
// until it takes the ACPI tables, and gives the blobs as the firmware gets them. QEMU makes them at that moment, from the
// addresses that the firmware gave to PCI, so nothing else makes the same ones. The VM does not go on after that. A VM
// whose firmware takes no tables ends with ctx.
//
// The arguments are those of the VM to be measured with TDX taken away, as qemu.EmulatedTDX gives them: machine type,
// options, memory, CPUs, devices and their places as they are; pic=off, which QEMU does to a TD by itself; a CPU with 46
// bits of physical addresses or more, since the firmware places PCI devices by them. Each of these changes the tables.
// The arguments name no file descriptors below 5.
//
// That the firmware measures these very blobs is tested with a TPM in the TD's place. That QEMU gives a TD under KVM the
// same tables is not proven: it was never compared with hardware. QEMU's own code for TDs changes nothing else that the
// tables are made of, as far as it was read; builds with Intel's earlier patches, which were not merged, do: their tables
// tell a TD of edge-triggered interrupts only.
func ACPIFromQEMU(ctx context.Context, binary string, args ...string) (*ACPI, error) {
	a, err := acpiFromQEMU(ctx, binary, args)
	if err != nil {
		return nil, fmt.Errorf("ACPI blobs from %s: %w (the arguments must be of a whole machine that starts under emulation, firmware included)", binary, err)
	}
	return a, a.check()
}

func acpiFromQEMU(ctx context.Context, binary string, args []string) (_ *ACPI, err error) {
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
	for _, name := range []string{fileACPILoader, fileACPIRSDP, fileACPITables} {
		if _, ok := files[name]; !ok {
			return nil, fmt.Errorf("this machine has no %s: %w", name, errdefs.ErrNotFound)
		}
	}
	trace.watch(files[fileACPITables].key)
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
	var a ACPI
	for name, blob := range map[string]*[]byte{fileACPILoader: &a.Loader, fileACPIRSDP: &a.RSDP, fileACPITables: &a.Tables} {
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

// qtestClient speaks the line protocol of -qtest.
type qtestClient struct {
	conn net.Conn
	in   *bufio.Reader
}

// call sends a command and gives what stands behind "OK" in the answer.
func (q *qtestClient) call(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(q.conn, format+"\n", args...); err != nil {
		return "", err
	}
	var line []byte
	for {
		part, err := q.in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > qtestLineMax:
			return "", fmt.Errorf("QEMU's answer is too long: %w", errdefs.ErrOutOfRange)
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return "", err
		}
		break
	}
	text, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "OK")
	if !ok {
		return "", fmt.Errorf("QEMU answers %.100q: %w", line, errdefs.ErrFailedPrecondition)
	}
	return strings.TrimSpace(text), nil
}

// read takes an item of the device, by one DMA transfer into the guest's memory, so that the guest cannot come between.
func (q *qtestClient) read(key uint16, size uint32) ([]byte, error) {
	if size == 0 || size > maxACPI {
		return nil, fmt.Errorf("%d bytes: %w", size, errdefs.ErrOutOfRange)
	}
	be := binary.BigEndian
	descriptor := be.AppendUint32(nil, uint32(key)<<16|fwcfgSelectRead)
	descriptor = be.AppendUint32(descriptor, size)
	descriptor = be.AppendUint64(descriptor, guestBuffer)
	if _, err := q.call("write %#x %d 0x%x", guestDescriptor, descriptorSize, descriptor); err != nil {
		return nil, err
	}
	// The device's registers are big-endian. Writing the address's lower half starts the transfer.
	if _, err := q.call("outl %#x 0", fwcfgDMA); err != nil {
		return nil, err
	}
	if _, err := q.call("outl %#x %#x", fwcfgDMA+4, bits.ReverseBytes32(guestDescriptor)); err != nil {
		return nil, err
	}
	state, err := q.memory(guestDescriptor, 4)
	if err != nil {
		return nil, err
	}
	if be.Uint32(state) != 0 {
		return nil, fmt.Errorf("the DMA transfer failed (%#x): %w", state, errdefs.ErrUnavailable)
	}
	return q.memory(guestBuffer, size)
}

func (q *qtestClient) memory(address uint64, size uint32) ([]byte, error) {
	text, err := q.call("read %#x %d", address, size)
	if err != nil {
		return nil, err
	}
	b, err := hex.DecodeString(strings.TrimPrefix(text, "0x"))
	if err == nil && len(b) != int(size) {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

type fwcfgFile struct {
	key  uint16
	size uint32
}

func (q *qtestClient) directory() (map[string]fwcfgFile, error) {
	head, err := q.read(fwcfgDirectory, 4)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head)
	if n > fwcfgMaxFiles {
		return nil, fmt.Errorf("%d files of the firmware configuration device: %w", n, errdefs.ErrOutOfRange)
	}
	raw, err := q.read(fwcfgDirectory, 4+n*fwcfgEntrySize)
	if err != nil {
		return nil, err
	}
	files := map[string]fwcfgFile{}
	for raw = raw[4:]; len(raw) > 0; raw = raw[fwcfgEntrySize:] {
		name, _, _ := strings.Cut(string(raw[8:fwcfgEntrySize]), "\x00")
		files[name] = fwcfgFile{key: binary.BigEndian.Uint16(raw[4:]), size: binary.BigEndian.Uint32(raw)}
	}
	return files, nil
}

// traceReader takes QEMU's error output: it waits for the item to be selected, and keeps the rest for messages.
type traceReader struct {
	mu       sync.Mutex
	key      uint64
	armed    bool
	partial  []byte
	rest     []byte
	selected chan struct{}
}

func (t *traceReader) watch(key uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.key, t.armed = uint64(key), true
}

func (t *traceReader) tail() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(append(t.rest[:len(t.rest):len(t.rest)], t.partial...))
}

// Write never fails.
func (t *traceReader) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.partial = append(t.partial, b...)
	for {
		line, behind, ok := bytes.Cut(t.partial, []byte("\n"))
		if !ok {
			break
		}
		t.line(line)
		t.partial = behind
	}
	if len(t.partial) > stderrTail {
		t.partial = t.partial[len(t.partial)-stderrTail:]
	}
	return len(b), nil
}

func (t *traceReader) line(line []byte) {
	m := selectLine.FindSubmatch(line)
	if m == nil {
		t.rest = append(append(t.rest, line...), '\n')
		t.rest = t.rest[max(0, len(t.rest)-stderrTail):]
		return
	}
	if key, err := strconv.ParseUint(string(m[1]), 16, 16); err == nil && t.armed && key == t.key {
		select {
		case t.selected <- struct{}{}:
		default: // told already
		}
	}
}
