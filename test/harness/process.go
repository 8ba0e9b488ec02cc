// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/cloister-project/cloister/internal/procid"
)

// process is a process of the node.
type process struct {
	ref  procid.Ref
	exe  string // base name, "" for a kernel thread
	line string
	why  string
}

// ours says that the process was made by or for the node, and may be killed: somebody's shell or pager that merely
// looks at the node's files belongs to it too, as long as it keeps one open.
func (p process) ours() bool {
	if p.why == whyCgroup {
		return true
	}
	for _, prefix := range []string{
		"containerd", "runc", "qemu-system", "virtiofsd", "cloister", "mkfs.erofs", "ctr", "crictl", "nerdctl",
		"bridge", "host-local", "loopback", "portmap", "firewall", "tuning", "crane", "critest", "cri-integration", "client-suite",
	} {
		if strings.HasPrefix(p.exe, prefix) {
			return true
		}
	}
	return false
}

const whyCgroup = "cgroup"

func (p process) String() string { return fmt.Sprintf("pid %d (%s): %s", p.ref.PID, p.why, p.line) }

// processes finds everything that belongs to the node: by command line or cgroup (the node's name is in both), by
// network namespace, by executable or working directory below the node's directory, or by a file open there. Ourselves and
// zombies are left out.
func (n *Node) processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	netns := ""
	if info, err := os.Stat("/run/netns/" + n.Name); err == nil {
		netns = fmt.Sprintf("net:[%d]", info.Sys().(*syscall.Stat_t).Ino)
	}
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, err := procid.ReadStat(pid)
		if err != nil || stat.Ended() {
			continue
		}
		if why := n.belongs(filepath.Join("/proc", e.Name()), netns); why != "" {
			exe, _ := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
			found = append(found, process{procid.Ref{PID: pid, Start: stat.Start}, filepath.Base(exe), commandLine(pid), why})
		}
	}
	return found, nil
}

// belongs says why the process at /proc/PID is the node's; it is "" for others and for one that has just gone.
func (n *Node) belongs(proc, netns string) string {
	if groups, _ := os.ReadFile(filepath.Join(proc, "cgroup")); bytes.Contains(groups, []byte("/"+n.Name+"/")) {
		return whyCgroup
	}
	if line, _ := os.ReadFile(filepath.Join(proc, "cmdline")); bytes.Contains(line, []byte(n.Dir)) {
		return "command line"
	}
	if ns, _ := os.Readlink(filepath.Join(proc, "ns/net")); netns != "" && ns == netns {
		return "network namespace"
	}
	for _, link := range []string{"exe", "cwd", "root"} {
		if target, _ := os.Readlink(filepath.Join(proc, link)); n.within(target) {
			return link
		}
	}
	fds, _ := os.ReadDir(filepath.Join(proc, "fd"))
	for _, fd := range fds {
		if target, _ := os.Readlink(filepath.Join(proc, "fd", fd.Name())); n.within(target) {
			return "open file " + target
		}
	}
	return ""
}

func (n *Node) within(path string) bool {
	return path == n.Dir || strings.HasPrefix(path, n.Dir+"/")
}

func commandLine(pid int) string {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	line := strings.TrimSpace(string(bytes.ReplaceAll(data, []byte{0}, []byte{' '})))
	if len(line) > 200 {
		line = line[:200] + "…"
	}
	return line
}

// ResidentKiB is the resident memory of a process on the host, from VmRSS of /proc/PID/status.
func ResidentKiB(pid int) (int, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
		}
	}
	return 0, fmt.Errorf("%s has no VmRSS", path)
}

// Pids lists the node's processes whose executable's name begins with prefix ("qemu-system", "containerd-shim").
func (n *Node) Pids(prefix string) ([]int, error) {
	all, err := n.processes()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range all {
		if strings.HasPrefix(p.exe, prefix) {
			pids = append(pids, p.ref.PID)
		}
	}
	return pids, nil
}
