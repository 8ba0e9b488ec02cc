// SPDX-License-Identifier: Apache-2.0

// Command guestinit is PID 1 of the guest in the test with a real QEMU: it loads the vsock modules, dials the host, and
// serves echo (port 1), discard (port 2) and source (port 3).
package main

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guestinit:", err)
		_ = unix.IoctlSetInt(1, unix.TCSBRK, 1) // tcdrain
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	_ = unix.Mkdir("/dev", 0o755)
	if err := unix.Mount("dev", "/dev", "devtmpfs", 0, ""); err == nil {
		if fd, err := unix.Open("/dev/console", unix.O_RDWR, 0); err == nil {
			_ = unix.Dup2(fd, 1)
			_ = unix.Dup2(fd, 2)
		}
	}
	for _, m := range []string{"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"} {
		f, err := os.Open("/" + m + ".ko")
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			return fmt.Errorf("module %s: %w", m, err)
		}
		_ = f.Close()
	}
	for port, serve := range map[uint32]func(int){1: echo, 2: discard, 3: source} {
		l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		if err := unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := unix.Listen(l, 256); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		go func() {
			for {
				fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
				if err != nil {
					fmt.Println("guestinit: accept:", err)
					return
				}
				go serve(fd)
			}
		}()
	}
	ready, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(ready, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 1024}); err != nil {
		return fmt.Errorf("connect to the host: %w", err)
	}
	if _, err := unix.Write(ready, []byte("ready")); err != nil {
		return err
	}
	// Until the host closes its end.
	for n := 1; n > 0; {
		n, _ = unix.Read(ready, make([]byte, 1))
	}

	return nil
}

func writeAll(fd int, b []byte) bool {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil {
			return false
		}
		b = b[n:]
	}
	return true
}

func echo(fd int) {
	defer unix.Close(fd)
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, b)
		if err != nil || n == 0 || !writeAll(fd, b[:n]) {
			return
		}
	}
}

// discard answers the end of the data with its length.
func discard(fd int) {
	defer unix.Close(fd)
	b := make([]byte, 64<<10)
	total := uint64(0)
	for {
		n, err := unix.Read(fd, b)
		if err != nil || n == 0 {
			break
		}
		total += uint64(n)
	}
	writeAll(fd, binary.LittleEndian.AppendUint64(nil, total))
}

// source sends as many bytes as it is asked for, and closes at once.
func source(fd int) {
	defer unix.Close(fd)
	var want [8]byte
	if n, err := unix.Read(fd, want[:]); err != nil || n != 8 {
		return
	}
	b := make([]byte, 64<<10)
	for left := binary.LittleEndian.Uint64(want[:]); left > 0; {
		n := min(left, uint64(len(b)))
		if !writeAll(fd, b[:n]) {
			return
		}
		left -= n
	}
}
