// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/tee/abi"
)

// fakeVariable makes the test binary a QEMU that misbehaves in the way its value says.
const fakeVariable = "CLOISTER_TEST_FAKE_QEMU"

// fakeQEMU never returns. It logs each command to stderr.
func fakeQEMU(mode string) {
	if mode == "refuses-snp" {
		fmt.Fprintln(os.Stderr, "qemu: -accel kvm,kernel-irqchip=split: vm-type SEV-SNP not supported by KVM")
		os.Exit(1)
	}
	if mode == "dies" {
		fmt.Fprintln(os.Stderr, "qemu: \x1b[31mno such thing\x07")
		os.Exit(1)
	}
	conn := inherited("qmp")
	if mode == "mute" {
		select {}
	}
	fmt.Fprintln(conn, `{"QMP": {"version": {}, "capabilities": []}}`)
	lines := bufio.NewScanner(conn)
	deleted := map[string]int{}
	var requested, size int // of the memory device
	for lines.Scan() {
		var c struct {
			Execute   string
			Arguments map[string]any
			ID        int
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			os.Exit(3)
		}
		fmt.Fprintln(os.Stderr, "command", c.Execute, c.Arguments["id"], c.Arguments["node-name"])
		event := func(name, data string) {
			fmt.Fprintf(conn, `{"timestamp": {"seconds": 1, "microseconds": 1}, "event": %q, "data": %s}`+"\n", name, data)
		}
		result := `"return": {}`
		switch mode + "/" + c.Execute {
		case "panics/cont":
			event("GUEST_PANICKED", `{"action": "poweroff", "info": {"type": "tdx", "error-code": 66, "message": "evil \u001b[2J words", "gpa": 0}}`)
			event("SHUTDOWN", `{"guest": true, "reason": "guest-panic"}`)
			os.Exit(0)
		case "panics-sev/cont":
			event("GUEST_PANICKED", `{"action": "poweroff", "info": {"type": "sev", "set": 1, "code": 18}}`)
			event("SHUTDOWN", `{"guest": true, "reason": "guest-panic"}`)
			os.Exit(0)
		case "panics-twice/cont":
			console := inherited("console")
			fmt.Fprintln(console, "[    1.0] Kernel panic - not syncing: no init")
			console.Close()
			event("GUEST_PANICKED", `{"action": "poweroff", "info": {"type": "tdx", "error-code": 1, "message": "`+strings.Repeat("long ",
				400)+`", "gpa": 4096}}`)
			event("SHUTDOWN", `{"guest": true, "reason": "guest-panic"}`)
			os.Exit(0)
		case "panics-oddly/cont":
			event("GUEST_PANICKED", `{"action": "poweroff", "info": {"type": 7, "set": "x"}}`)
			event("SHUTDOWN", `{"guest": true, "reason": "guest-panic"}`)
			os.Exit(0)
		case "stuck/cont":
			event("STOP", "{}")
		case "stuck/query-status":
			result = `"return": {"status": "internal-error", "running": false}`
		case "garbage/cont":
			fmt.Fprintln(conn, "hello?")
			continue
		case "hangs/cont":
			conn.Close()
			select {}
		case "exits/cont":
			os.Exit(7)
		case "grows/qom-set", "grows-half/qom-set", "grows-not/qom-set":
			asked := int(c.Arguments["value"].(float64))
			switch mode {
			case "grows":
				requested = asked
				event("MEMORY_DEVICE_SIZE_CHANGE", `{"id": "other", "size": 1}`)
				size = requested / 2
				event("MEMORY_DEVICE_SIZE_CHANGE", fmt.Sprintf(`{"id": "memory0", "size": %d}`, size))
				size = requested
				event("MEMORY_DEVICE_SIZE_CHANGE", fmt.Sprintf(`{"id": "memory0", "size": %d}`, size))
			case "grows-half":
				requested = asked
				size = max(size, requested/2)
				event("MEMORY_DEVICE_SIZE_CHANGE", fmt.Sprintf(`{"id": "memory0", "size": %d}`, size))
			default:
				result = `"error": {"class": "GenericError", "desc": "no room"}`
			}
		case "grows/qom-get", "grows-half/qom-get", "grows-not/qom-get":
			value := map[any]int{"requested-size": requested, "size": size}[c.Arguments["property"]]
			result = fmt.Sprintf(`"return": %d`, value)
		case "silent/device_add":
			continue
		case "refuses/device_add":
			result = `"error": {"class": "GenericError", "desc": "no such bus"}`
		case "slow/device_del":
			id := c.Arguments["id"].(string)
			if deleted[id]++; deleted[id] > 1 {
				result = `"error": {"class": "DeviceNotFound", "desc": "not found"}`
			}
		case "chatty/cont":
			console := inherited("console")
			for i := range 60000 {
				fmt.Fprintf(console, "\x1b[1mline %d\x1b[0m\r\x08 of \xff nonsense\n", i)
			}
			console.Close()
			os.Exit(0)
		}
		fmt.Fprintf(conn, `{%s, "id": %d}`+"\n", result, c.ID)
	}
	os.Exit(0)
}

// inherited opens the file behind -chardev socket,id=ID,fd=N.
func inherited(id string) net.Conn {
	for _, a := range os.Args {
		var fd uintptr
		if _, err := fmt.Sscanf(a, "socket,id="+id+",fd=%d", &fd); err == nil {
			f := os.NewFile(fd, id)
			conn, err := net.FileConn(f)
			if err != nil {
				os.Exit(4)
			}
			f.Close() // conn is a copy
			return conn
		}
	}
	os.Exit(5)
	return nil
}

// fakeDriver starts fake QEMUs.
func fakeDriver(t *testing.T, mode string) (*Driver, hypervisor.Document) {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	require.NoError(t, err)
	wrapper := filepath.Join(dir, "qemu")
	require.NoError(t, os.WriteFile(wrapper, fmt.Appendf(nil, "#!/bin/sh\nexec env %s=%s %s \"$@\"\n", fakeVariable, mode, self), 0o700))
	kernel := make([]byte, 1024)
	kernel[0x1fe], kernel[0x1ff] = 0x55, 0xaa
	copy(kernel[0x202:], "HdrS")
	path := filepath.Join(dir, "kernel")
	require.NoError(t, os.WriteFile(path, kernel, 0o600))
	d := New(Config{Arch: hypervisor.ArchAMD64})
	d.found = &program{path: wrapper, features: debianFeatures()}
	return d, vmtest.Document(d, hypervisor.AccelTCG, path, path, "idle")
}

func TestFaults(t *testing.T) {
	for mode, want := range map[string]struct {
		reason hypervisor.ExitReason
		detail string
	}{
		"panics":     {hypervisor.ExitGuestPanic, "the guest reported a panic (tdx, error code 0x42, more at guest address 0x0, evil words)"},
		"panics-sev": {hypervisor.ExitGuestPanic, "the guest reported a panic (sev, set 0x1, code 0x12)"},
		"panics-twice": {hypervisor.ExitGuestPanic, "Kernel panic - not syncing: no init; the guest reported a panic (tdx, error code 0x1, " +
			"more at guest address 0x1000, long long"},
		"panics-oddly": {hypervisor.ExitGuestPanic, "the guest reported a panic"},
		"stuck":        {hypervisor.ExitVMM, "cannot execute the guest any more: internal-error"},
		"garbage":      {hypervisor.ExitVMM, "control connection broke"},
		"hangs":        {hypervisor.ExitVMM, "did not end"},
		"exits":        {hypervisor.ExitVMM, "QEMU exited with status 7"},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d, doc := fakeDriver(t, mode)
			v := startGuest(t, d, doc)
			_ = v.Boot(context.Background()) // some end before they answer
			exit := waitEnd(t, v)
			require.Equal(t, want.reason, exit.Reason, exit.Error())
			require.Contains(t, exit.Detail, want.detail)
			require.Less(t, len(exit.Detail), 600)
			require.Contains(t, exit.VMMLog, "command cont")
			require.ErrorIs(t, v.AddDisk(context.Background(), vmtest.Disk(t, t.TempDir(), 1)), errdefs.ErrFailedPrecondition)
		})
	}
}

func TestStartFaults(t *testing.T) {
	t.Run("dies", func(t *testing.T) {
		d, doc := fakeDriver(t, "dies")
		dir := t.TempDir()
		_, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: dir})
		require.ErrorContains(t, err, "QEMU exited with status 1")
		require.ErrorContains(t, err, "qemu: no such thing")
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	})
	t.Run("refuses the platform", func(t *testing.T) {
		d, doc := fakeDriver(t, "refuses-snp")
		_, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: t.TempDir()})
		var exit hypervisor.Exit
		require.ErrorAs(t, err, &exit)
		require.Equal(t, "QEMU exited with status 1", exit.Detail)
		require.Contains(t, exit.VMMLog, "vm-type SEV-SNP not supported by KVM")
	})
	t.Run("mute", func(t *testing.T) {
		d, doc := fakeDriver(t, "mute")
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		_, err := d.Start(ctx, doc, hypervisor.Resources{StateDir: t.TempDir()})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "greeting")
	})
}

func TestAddDiskRefused(t *testing.T) {
	d, doc := fakeDriver(t, "refuses")
	v := startGuest(t, d, doc)
	disk := vmtest.Disk(t, t.TempDir(), 1)
	for range 2 { // nothing is kept of the first
		require.ErrorContains(t, v.AddDisk(context.Background(), disk), "no such bus")
	}
	awaitLog(t, v, "command blockdev-del", 2)
	require.ErrorIs(t, v.RemoveDisk(context.Background(), disk.ID), errdefs.ErrNotFound)
	require.ErrorContains(t, v.AddSharedDirectory(context.Background(), hypervisor.SharedDirectory{ID: "a", Tag: "a", Socket: "/x"}),
		"no such bus")
	awaitLog(t, v, "command chardev-remove chr-share-a", 1)
}

// awaitLog waits until the VMM's log, which is read while the VMM goes on, has a text as often as given, and no more often.
func awaitLog(t *testing.T, v *vm, text string, times int) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		log, changed := v.Logs.VMM.Text()
		if strings.Count(log, text) >= times {
			require.Equal(t, times, strings.Count(log, text), log)
			return
		}
		select {
		case <-changed:
		case <-v.Done():
			require.FailNow(t, "the VMM ended", log)
		case <-timeout:
			require.FailNow(t, "the VMM's log has not "+text, log)
		}
	}
}

func TestAddSharedDirectoryToConfidentialVM(t *testing.T) {
	d, doc := fakeDriver(t, "none")
	doc.SharedDirectories, doc.Confidential = 0, &hypervisor.Confidential{Platform: abi.Sample}
	v := startGuest(t, d, doc)
	err := v.AddSharedDirectory(context.Background(), hypervisor.SharedDirectory{ID: "a", Tag: "a", Socket: "/x"})
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	require.ErrorContains(t, err, "this VM is confidential")
	// Disks are no directories.
	require.NoError(t, v.AddDisk(context.Background(), vmtest.Disk(t, t.TempDir(), 1)))
	// What came before the disk is in the log by then.
	awaitLog(t, v, "command device_add", 1)
	log, _ := v.Logs.VMM.Text()
	require.NotContains(t, log, "chardev-add")
}

func TestAddDiskCancelled(t *testing.T) {
	d, doc := fakeDriver(t, "none")
	v := startGuest(t, d, doc)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, v.AddDisk(ctx, vmtest.Disk(t, t.TempDir(), 1)), context.Canceled)
	require.NoError(t, v.AddDisk(context.Background(), vmtest.Disk(t, t.TempDir(), 1)))
}

func TestAddDiskWhileQEMUEnds(t *testing.T) {
	d, doc := fakeDriver(t, "silent")
	v := startGuest(t, d, doc)
	errs := make(chan error, 1)
	go func() { errs <- v.AddDisk(context.Background(), vmtest.Disk(t, t.TempDir(), 1)) }()
	awaitLog(t, v, "device_add", 1)
	require.ErrorIs(t, v.RemoveDisk(context.Background(), "layer-1"), errdefs.ErrUnavailable)
	v.Kill()
	require.ErrorIs(t, <-errs, errdefs.ErrFailedPrecondition)
}

func TestRemoveDiskRepeated(t *testing.T) {
	d, doc := fakeDriver(t, "slow")
	v := startGuest(t, d, doc)
	disk := vmtest.Disk(t, t.TempDir(), 1)
	require.NoError(t, v.AddDisk(context.Background(), disk))
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, v.RemoveDisk(ctx, disk.ID), context.DeadlineExceeded)
	require.NoError(t, v.RemoveDisk(context.Background(), disk.ID))
	require.ErrorIs(t, v.RemoveDisk(context.Background(), disk.ID), errdefs.ErrNotFound)
}

func TestConsoleIsBounded(t *testing.T) {
	d, doc := fakeDriver(t, "chatty")
	dir := t.TempDir()
	h, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: dir})
	require.NoError(t, err)
	_ = h.Boot(context.Background())
	<-h.Done()
	exit := h.Exit()
	require.LessOrEqual(t, len(exit.Console), 4<<10)
	require.True(t, strings.HasSuffix(exit.Console, "line 59999 of ? nonsense"), exit.Console)
	var size int64
	for _, name := range []string{supervise.ConsoleLog, supervise.ConsoleLog + ".1"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.NotContains(t, string(b), "\x1b")
		size += int64(len(b))
	}
	require.LessOrEqual(t, size, int64(supervise.MaxLogFile))
}

func TestGrow(t *testing.T) {
	start := func(mode string) *vm {
		d, doc := fakeDriver(t, mode)
		doc.Memory.MaxBytes = doc.Memory.Bytes + 256<<20
		return startGuest(t, d, doc)
	}
	v := start("grows")
	has := v.doc.Memory.Bytes
	require.NoError(t, v.Grow(t.Context(), has), "there is nothing to do")
	require.NoError(t, v.Grow(t.Context(), has+128<<20))
	require.NoError(t, v.Grow(t.Context(), has+64<<20), "it has more")
	require.NoError(t, v.Grow(t.Context(), has+256<<20))
	require.ErrorIs(t, v.Grow(t.Context(), has+258<<20), errdefs.ErrOutOfRange)
	awaitLog(t, v, "command qom-set", 2)

	v = start("grows-half")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := v.Grow(ctx, v.doc.Memory.Bytes+128<<20)
	require.ErrorIs(t, err, errdefs.ErrOutOfRange)
	require.ErrorContains(t, err, "the guest took 64 MiB of 128 MiB")
	awaitLog(t, v, "command qom-set", 2) // the rest is taken back
	require.NoError(t, v.Grow(t.Context(), v.doc.Memory.Bytes+64<<20), "what it took stays")

	v = start("grows-not")
	for range 2 { // nothing is kept of the first
		require.ErrorContains(t, v.Grow(t.Context(), v.doc.Memory.Bytes+128<<20), "no room")
	}
}
