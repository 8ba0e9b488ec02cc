// SPDX-License-Identifier: Apache-2.0

// Command init is PID 1 of the guest in the tests of VMMs' drivers. It writes what it sees to the console, one line each,
// and does what the kernel parameter init.do says: idle, directories, devices, poweroff, reset, panic.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	_ = os.MkdirAll("/proc", 0o755)
	_ = os.MkdirAll("/sys", 0o755)
	_ = unix.Mount("proc", "/proc", "proc", 0, "")
	_ = unix.Mount("sysfs", "/sys", "sysfs", 0, "")
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	fmt.Printf("INIT up %d ms\n", ts.Nano()/1e6)

	switch parameter("init.do") {
	case "poweroff":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reset":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		_ = os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0)
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "devices":
		loadModules()
		fmt.Printf("VIRTIO %s.\n", strings.Join(virtioDevices(), ","))
		fmt.Printf("NICS %s.\n", strings.Join(nics(), ","))
		fmt.Printf("LISTEN %v.\n", listen())
		fmt.Printf("VSOCK %s.\n", talk())
		watch("DISKS", disks)
	case "directories":
		watch("DIRECTORIES", directories)
	}
	for {
		time.Sleep(time.Hour)
	}
}

func parameter(name string) string {
	b, _ := os.ReadFile("/proc/cmdline")
	for _, f := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return ""
}

// loadModules loads /modules/*.ko in the order of their names.
func loadModules() {
	names, _ := filepath.Glob("/modules/*.ko")
	slices.Sort(names)
	for _, name := range names {
		start := time.Now()
		f, err := os.Open(name)
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
		fmt.Printf("MODULE %s %v %d ms\n", filepath.Base(name), err, time.Since(start).Milliseconds())
	}
}

// watch prints a line each time that the list changes.
func watch(what string, list func() []string) {
	last := "?"
	for {
		now := list()
		slices.Sort(now)
		if s := strings.Join(now, ","); s != last {
			last = s
			fmt.Printf("%s %d: %s.\n", what, len(now), s)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// virtioDevices are bus/device type/modern/access platform, the latter two as negotiated: features 32 and 33 of virtio
// 1.2, section 6. It waits until each has its driver.
func virtioDevices() []string {
	for {
		paths, _ := filepath.Glob("/sys/bus/virtio/devices/*")
		var out []string
		bound := 0
		for _, p := range paths {
			kind, _ := os.ReadFile(filepath.Join(p, "device"))
			features, _ := os.ReadFile(filepath.Join(p, "features"))
			status, _ := os.ReadFile(filepath.Join(p, "status"))
			if strings.TrimSpace(string(status)) == "0x0000000f" {
				bound++
			}
			parent, _ := filepath.EvalSymlinks(p)
			bus, _ := filepath.EvalSymlinks(filepath.Join(filepath.Dir(parent), "subsystem"))
			if len(features) > 33 {
				out = append(out, fmt.Sprintf("%s/%s/%c/%c", filepath.Base(bus), strings.TrimSpace(string(kind)), features[32], features[33]))
			}
		}
		if bound == len(paths) {
			slices.Sort(out)
			return out
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// nics are address/MTU.
func nics() []string {
	paths, _ := filepath.Glob("/sys/class/net/*")
	var out []string
	for _, p := range paths {
		if filepath.Base(p) == "lo" {
			continue
		}
		address, _ := os.ReadFile(filepath.Join(p, "address"))
		mtu, _ := os.ReadFile(filepath.Join(p, "mtu"))
		out = append(out, strings.TrimSpace(string(address))+"/"+strings.TrimSpace(string(mtu)))
	}
	return out
}

// listen answers the host's greetings over vsock with what it heard, from then on.
func listen() error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: 1025}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 1); err != nil {
		return err
	}
	go func() {
		for {
			conn, _, err := unix.Accept(fd)
			if err != nil {
				fmt.Printf("ACCEPT %v.\n", err)
				return
			}
			var words [64]byte
			if n, err := unix.Read(conn, words[:]); err == nil {
				_, _ = unix.Write(conn, append([]byte("heard "), words[:n]...))
			}
			_ = unix.Close(conn)
		}
	}()
	return nil
}

// talk greets the host over vsock and returns its answer.
func talk() string {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 1024}); err != nil {
		return err.Error()
	}
	if _, err := unix.Write(fd, []byte("I am "+runtime.GOARCH)); err != nil {
		return err.Error()
	}
	var answer [64]byte
	n, err := unix.Read(fd, answer[:])
	if err != nil {
		return err.Error()
	}
	return string(answer[:n])
}

// disks are serial=first bytes/read-only, of SCSI disks and of virtio-blk ones.
func disks() []string {
	paths, _ := filepath.Glob("/sys/block/[sv]d*")
	var out []string
	for _, p := range paths {
		serial, err := os.ReadFile(filepath.Join(p, "serial"))
		if err != nil {
			vpd, err := os.ReadFile(filepath.Join(p, "device/vpd_pg80"))
			if err != nil || len(vpd) < 4 {
				continue
			}
			serial = vpd[4:]
		}
		out = append(out, strings.TrimSpace(string(serial))+"="+content(p))
	}
	return out
}

func content(sys string) string {
	b, err := os.ReadFile(filepath.Join(sys, "dev"))
	if err != nil {
		return "?"
	}
	var major, minor uint32
	_, _ = fmt.Sscanf(string(b), "%d:%d", &major, &minor)
	node := "/" + filepath.Base(sys)
	_ = unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	defer os.Remove(node)
	f, err := os.Open(node)
	if err != nil {
		return "?"
	}
	defer f.Close()
	var head [8]byte
	if _, err := f.Read(head[:]); err != nil {
		return "?"
	}
	ro, _ := os.ReadFile(filepath.Join(sys, "ro"))
	return strings.TrimRight(string(head[:]), "\x00") + "/" + strings.TrimSpace(string(ro))
}

// directories are the PCI functions of virtio-fs (device id 0x105a).
func directories() []string {
	paths, _ := filepath.Glob("/sys/bus/pci/devices/*/device")
	var out []string
	for _, p := range paths {
		if b, _ := os.ReadFile(p); strings.TrimSpace(string(b)) == "0x105a" {
			if drv, err := filepath.Glob(filepath.Join(filepath.Dir(p), "virtio*/driver")); err == nil && len(drv) == 1 {
				out = append(out, filepath.Base(filepath.Dir(p)))
			}
		}
	}
	return out
}
