// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// The test with a real QEMU and a real guest kernel needs a bzImage and the directory with its modules (the one that holds
// kernel/net/vmw_vsock):
//
//	CLOISTER_TEST_KERNEL=/boot/vmlinuz-6.12.95+deb12-cloud-amd64
//	CLOISTER_TEST_MODULES=/lib/modules/6.12.95+deb12-cloud-amd64
const (
	envKernel  = "CLOISTER_TEST_KERNEL"
	envModules = "CLOISTER_TEST_MODULES"
)

func TestQEMU(t *testing.T) {
	others := shmemRSS(t) // tests with a fake guest keep its memory
	vm := startVM(t)
	t.Run("echo", func(t *testing.T) { roundTrip(t, vm.dial(t, 1), random(20<<20)) })
	t.Run("refused", func(t *testing.T) {
		_, err := vm.d.Dial(t.Context(), 99)
		require.ErrorIs(t, err, vsock.ErrRefused)
	})
	t.Run("guest closes at once", func(t *testing.T) {
		for range 20 {
			const n = 200_000
			c := vm.dial(t, 3)
			ask(t, c, n)
			got, err := io.Copy(io.Discard, c)
			require.NoError(t, err)
			require.EqualValues(t, n, got)
			require.NoError(t, c.Close())
		}
	})
	t.Run("host closes at once", func(t *testing.T) {
		for range 20 {
			c := vm.dial(t, 2)
			_, err := c.Write(make([]byte, 100_000))
			require.NoError(t, err)
			require.NoError(t, c.Close())
		}
	})
	t.Run("streams", func(t *testing.T) {
		data := random(64 << 10)
		var wg sync.WaitGroup
		for i := range 200 {
			c := vm.dial(t, 1)
			wg.Add(1)
			go func() {
				defer wg.Done()
				roundTrip(t, c, data[i:])
			}()
		}
		wg.Wait()
	})
	t.Run("slow reader", func(t *testing.T) {
		slow := vm.dial(t, 3)
		ask(t, slow, 4<<20)
		roundTrip(t, vm.dial(t, 1), random(4<<20))
		n, err := io.Copy(io.Discard, slow)
		require.NoError(t, err)
		require.EqualValues(t, 4<<20, n)
	})
	t.Run("pause", func(t *testing.T) {
		c := vm.dial(t, 1)
		done := make(chan error, 1)
		go func() { done <- tryRoundTrip(c, random(8<<20)) }()
		for range 5 {
			vm.qmp(t, "stop")
			vm.qmp(t, "cont")
		}
		require.NoError(t, <-done)
	})
	require.Eventually(t, func() bool {
		vm.d.mu.Lock()
		defer vm.d.mu.Unlock()
		return len(vm.d.streams) == 1 // ready
	}, testTimeout, 10*time.Millisecond)

	t.Run("numbers", func(t *testing.T) { vm.measure(t) })

	t.Run("pages are given back", func(t *testing.T) {
		before := shmemRSS(t)
		require.Eventually(t, func() bool { return shmemRSS(t)-others < 1<<20 }, testTimeout, 100*time.Millisecond)
		t.Logf("resident pages of the guest: %d KiB after traffic, %d KiB when idle", (before-others)>>10, (shmemRSS(t)-others)>>10)
	})
	t.Run("end", func(t *testing.T) {
		require.NoError(t, vm.ready.Close()) // the guest powers off
		<-vm.d.Done()
		require.ErrorIs(t, vm.d.Err(), errFrontEndGone)
	})
}

func (vm *testVM) measure(t *testing.T) {
	const total = 128 << 20
	c := vm.dial(t, 2)
	start := time.Now()
	b := make([]byte, 64<<10)
	for range total / len(b) {
		_, err := c.Write(b)
		require.NoError(t, err)
	}
	require.NoError(t, c.CloseWrite())
	var got [8]byte
	_, err := io.ReadFull(c, got[:])
	require.NoError(t, err)
	require.EqualValues(t, total, binary.LittleEndian.Uint64(got[:]))
	t.Logf("host to guest: %.1f MiB/s", total/(1<<20)/time.Since(start).Seconds())

	c = vm.dial(t, 3)
	start = time.Now()
	ask(t, c, total)
	for n := 0; n < total; {
		k, err := c.Read(b)
		require.NoError(t, err)
		n += k
	}
	t.Logf("guest to host: %.1f MiB/s", total/(1<<20)/time.Since(start).Seconds())

	c = vm.dial(t, 1)
	start = time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w := make([]byte, 64<<10)
		for range total / 4 / len(w) {
			_, _ = c.Write(w)
		}
	}()
	_, err = io.CopyN(io.Discard, c, total/4)
	require.NoError(t, err)
	<-done
	t.Logf("echo, each way: %.1f MiB/s", total/4/(1<<20)/time.Since(start).Seconds())

	var rtt, dial []time.Duration
	for range 1000 {
		start := time.Now()
		_, err := c.Write(b[:64])
		require.NoError(t, err)
		_, err = io.ReadFull(c, b[:64])
		require.NoError(t, err)
		rtt = append(rtt, time.Since(start))
	}
	for range 200 {
		start := time.Now()
		c, err := vm.d.Dial(t.Context(), 1)
		require.NoError(t, err)
		dial = append(dial, time.Since(start))
		require.NoError(t, c.Close())
	}
	slices.Sort(rtt)
	slices.Sort(dial)
	t.Logf("round trip of 64 bytes: p50 %s, p99 %s; dial: p50 %s", rtt[500], rtt[990], dial[100])
}

func ask(t *testing.T, c vsock.Conn, n uint64) {
	t.Helper()
	_, err := c.Write(binary.LittleEndian.AppendUint64(nil, n))
	require.NoError(t, err)
}

// shmemRSS returns the bytes of shared memory that are resident in this process.
func shmemRSS(t *testing.T) (bytes int) {
	status, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(status), "RssShmem:")
	require.True(t, ok)
	_, err = fmt.Sscanf(rest, "%d kB", &bytes)
	require.NoError(t, err)
	return bytes << 10
}

type testVM struct {
	d       *Device
	ready   vsock.Conn
	monitor *json.Decoder
	conn    net.Conn
}

// qmp runs a command and waits for its answer.
func (vm *testVM) qmp(t *testing.T, command string) {
	t.Helper()
	_, err := fmt.Fprintf(vm.conn, "{\"execute\":%q}\n", command)
	require.NoError(t, err)
	for {
		var m map[string]any
		require.NoError(t, vm.monitor.Decode(&m))
		require.NotContains(t, m, "error")
		if _, ok := m["return"]; ok {
			return
		}
	}
}

func (vm *testVM) dial(t *testing.T, port uint32) vsock.Conn {
	t.Helper()
	c, err := vm.d.Dial(t.Context(), port)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
	return c
}

// startVM boots a guest and waits until it has dialled the host.
func startVM(t *testing.T) *testVM {
	t.Helper()
	kernel, modules := os.Getenv(envKernel), os.Getenv(envModules)
	if kernel == "" || modules == "" {
		t.Skipf("needs a guest kernel: set %s to a bzImage and %s to the directory of its modules", envKernel, envModules)
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(initrd, buildInitrd(t, dir, modules), 0o600))

	d, err := New(Config{GuestCID: 3})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	l, err := d.Listen(1024)
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	console := filepath.Join(dir, "console")
	cmd := exec.CommandContext(ctx, qemu, "-machine", "q35,memory-backend=mem0", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512",
		"-object", "memory-backend-memfd,id=mem0,size=512M,share=on", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-serial", "file:"+console, "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1",
		"-qmp", "unix:"+filepath.Join(dir, "qmp")+",server=on,wait=off",
		"-chardev", "socket,id=vs0,fd=3", "-device", "vhost-user-vsock-pci,chardev=vs0")
	cmd.ExtraFiles = []*os.File{d.QEMUFile()}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	start := time.Now()
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(console)
			t.Logf("QEMU: %s\nconsole: %s", stderr.String(), log)
		}
	})
	require.NoError(t, d.QEMUFile().Close())
	type accepted struct {
		c   vsock.Conn
		err error
	}
	ch := make(chan accepted, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			ch <- accepted{nil, err}
			return
		}
		_, err = io.ReadFull(c, make([]byte, len("ready")))
		ch <- accepted{c.(vsock.Conn), err}
	}()
	select {
	case a := <-ch:
		require.NoError(t, a.err)
		t.Logf("guest was ready after %s", time.Since(start).Round(time.Millisecond))
		conn, err := net.Dial("unix", filepath.Join(dir, "qmp"))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		vm := &testVM{d: d, ready: a.c, conn: conn, monitor: json.NewDecoder(conn)}
		vm.qmp(t, "qmp_capabilities")
		return vm
	case <-time.After(2 * time.Minute):
		require.NoError(t, errors.New("the guest did not dial the host within two minutes"))
		return nil
	}
}

// buildInitrd packs the static init and the vsock modules.
func buildInitrd(t *testing.T, dir, modules string) []byte {
	t.Helper()
	bin := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "./testdata/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	init, err := os.ReadFile(bin)
	require.NoError(t, err)
	var b bytes.Buffer
	cpioEntry(&b, "init", 0o100755, init)
	for _, m := range []string{"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"} {
		path := filepath.Join(modules, "kernel/net/vmw_vsock", m+".ko")
		ko, err := os.ReadFile(path)
		if err != nil {
			ko, err = exec.Command("xz", "-dc", path+".xz").Output()
		}
		if err != nil {
			t.Skipf("needs the module %s, plain or as .xz with the xz tool: %v", path, err)
		}
		cpioEntry(&b, m+".ko", 0o100644, ko)
	}
	cpioEntry(&b, "TRAILER!!!", 0, nil)
	return b.Bytes()
}

// cpioEntry appends a file in the "newc" format.
func cpioEntry(b *bytes.Buffer, name string, mode int, data []byte) {
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	b.WriteString(name + "\x00")
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	pad()
	b.Write(data)
	pad()
}
