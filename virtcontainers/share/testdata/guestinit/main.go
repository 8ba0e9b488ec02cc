// SPDX-License-Identifier: Apache-2.0

// Command guestinit is the init of a test VM: it mounts the virtio-fs tag "shares" and does what it is told on the serial console.
// A command is a line of words separated by tabs; the answer is a line "@@ok <hex>" or "@@error <text>".
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const mountPoint = "/shares"

var (
	held   = map[string]*os.File{}
	mapped = map[string][]byte{}
)

func main() {
	in := bufio.NewReader(os.Stdin)
	_ = os.Mkdir(mountPoint, 0o755)
	answer(nil, unix.Mount("shares", mountPoint, "virtiofs", 0, ""))
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			break
		}
		words := strings.Split(strings.TrimRight(line, "\r\n"), "\t")
		if words[0] == "off" {
			break
		}
		answer(run(words))
	}
	_ = unix.Unmount(mountPoint, unix.MNT_DETACH)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func answer(out []byte, err error) {
	if err != nil {
		fmt.Printf("@@error %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
		return
	}
	fmt.Printf("@@ok %x\n", out)
}

func run(words []string) ([]byte, error) {
	if len(words) < 2 {
		return nil, errors.New("unknown command")
	}
	path := mountPoint + "/" + words[1]
	switch words[0] {
	case "read":
		return os.ReadFile(path)
	case "write":
		return nil, os.WriteFile(path, []byte(words[2]), 0o644)
	case "hold": // keeps the file open
		f, err := os.Open(path)
		held[words[1]] = f
		return nil, err
	case "reread":
		buf := make([]byte, 4096)
		n, err := held[words[1]].ReadAt(buf, 0)
		if n > 0 {
			err = nil
		}
		return buf[:n], err
	case "release":
		return nil, held[words[1]].Close()
	case "map":
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		copy(m, words[2])
		mapped[words[1]] = m
		return nil, unix.Msync(m, unix.MS_SYNC)
	case "ls":
		entries, err := os.ReadDir(path)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return []byte(strings.Join(names, " ")), err
	case "rm":
		return nil, os.Remove(path)
	case "rename":
		return nil, os.Rename(path, mountPoint+"/"+words[2])
	case "stat":
		var st unix.Stat_t
		err := unix.Lstat(path, &st)
		return fmt.Appendf(nil, "mode=%o uid=%d size=%d dev=%d", st.Mode, st.Uid, st.Size, st.Dev), err
	case "chown":
		return nil, unix.Chown(path, 1234, 5678)
	case "setxattr":
		return nil, unix.Setxattr(path, "user.note", []byte(words[2]), 0)
	}
	return nil, errors.New("unknown command")
}
