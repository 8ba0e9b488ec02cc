// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// leakBudget is how long leftovers may take to go: a few things end asynchronously (a veth after its namespace, a
// cgroup after its last process, containerd's own garbage collection).
const leakBudget = 15 * time.Second

// snapshot is everything of a node that could be left behind: descriptions that begin with what kind of thing it is.
type snapshot map[string]struct{}

// Leaks reports everything that is there now and was not when the node was started, once pods and containers are all
// removed. It waits a little for what ends asynchronously; nil means that nothing is left. These are compared:
//
//   - processes that belong to the node, however (see processes), and their children by the same rule;
//   - links in the node's network namespace, except its own bridge, and links of the host;
//   - mounts below or from the node's directory, among them references to network namespaces;
//   - named network namespaces;
//   - cgroups of all hierarchies with the node's name in their path;
//   - files, directories, sockets and FIFOs in containerd's and Cloister's state, its layer cache's unfinished files,
//     CNI's leases and results, and in /tmp, /run and /dev/shm what has the node's name;
//   - loop devices backed by files of the node.
//
// For a node that was stopped, Leaks is what is left of it as a whole.
func (n *Node) Leaks(ctx context.Context) ([]string, error) {
	if n.stopped {
		return n.leftBehind()
	}
	ctx, cancel := context.WithTimeout(ctx, leakBudget)
	defer cancel()
	ticker := time.NewTicker(2 * pollInterval)
	defer ticker.Stop()
	for {
		now, err := n.takeSnapshot()
		if err != nil {
			return nil, err
		}
		maps.DeleteFunc(now, func(what string, _ struct{}) bool { _, before := n.baseline[what]; return before })
		if len(now) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return slices.Sorted(maps.Keys(now)), nil
		case <-ticker.C:
		}
	}
}

func (n *Node) takeSnapshot() (snapshot, error) {
	s := snapshot{}
	return s, errors.Join(
		n.snapProcesses(s), n.snapLinks(s), n.snapMounts(s), n.snapNetns(s), n.snapCgroups(s), n.snapFiles(s), n.snapLoops(s),
	)
}

func (s snapshot) add(kind, what string) { s[kind+" "+what] = struct{}{} }

func (n *Node) snapProcesses(s snapshot) error {
	all, err := n.processes()
	for _, p := range all {
		// containerd is the node's own, however often it was restarted.
		if n.containerd != nil && p.ref.PID == n.containerd.cmd.Process.Pid {
			continue
		}
		s.add("process", p.String())
	}
	return err
}

func (n *Node) snapLinks(s snapshot) error {
	for _, where := range []string{"host", n.Name} {
		handle, err := netlinkAt(where, n.Name)
		if err != nil {
			return err
		}
		links, err := handle.LinkList()
		handle.Close()
		if err != nil {
			return fmt.Errorf("listing links of %s: %w", where, err)
		}
		for _, l := range links {
			// The first pod's CNI makes the bridge, and it stays.
			if name := l.Attrs().Name; name != n.Name {
				s.add("link", where+": "+l.Type()+" "+name)
			}
		}
	}
	return nil
}

func netlinkAt(where, name string) (*netlink.Handle, error) {
	if where != name {
		return netlink.NewHandle()
	}
	ns, err := netns.GetFromName(name)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns)
}

func (n *Node) snapMounts(s snapshot) error {
	mounts, err := n.mounts()
	for _, m := range mounts {
		s.add("mount", fmt.Sprintf("%s on %s (%s)", m.Source, m.Mountpoint, m.FSType))
	}
	return err
}

func (n *Node) snapNetns(s snapshot) error {
	entries, err := os.ReadDir("/run/netns")
	for _, e := range entries {
		// Other nodes come and go while this one lives.
		if e.Name() == n.Name || !strings.HasPrefix(e.Name(), "cl") || len(e.Name()) != len(n.Name) {
			s.add("netns", e.Name())
		}
	}
	return err
}

func (n *Node) snapCgroups(s snapshot) error {
	groups, err := n.cgroups()
	for _, g := range groups {
		// The parents that containerd and runc make for the node as a whole stay until the node is stopped.
		if filepath.Base(g) != n.Name {
			s.add("cgroup", g)
		}
	}
	return err
}

func (n *Node) snapLoops(s snapshot) error {
	devices, err := n.loops()
	for _, d := range devices {
		s.add("loop device", d)
	}
	return err
}

// snapFiles lists what is in the places where per-pod state is kept. Places that keep things beyond a pod on purpose
// (images, snapshots, logs, finished layer images) are not among them.
func (n *Node) snapFiles(s snapshot) error {
	for _, root := range []string{
		n.CloisterState,
		filepath.Join(n.Dir, "s"),
		filepath.Join(n.Dir, "runc"),
		filepath.Join(n.Dir, "tmp"),
		filepath.Join(n.State, "io.containerd.runtime.v2.task"),
		filepath.Join(n.State, "io.containerd.grpc.v1.cri"),
		filepath.Join(n.State, "io.containerd.cri.v1.runtime"),
		filepath.Join(n.State, "io.containerd.mount-manager.v1.bolt"),
		filepath.Join(n.State, "netns"),
		filepath.Join(n.Root, "io.containerd.runtime.v2.task"),
		filepath.Join(n.Root, "io.containerd.grpc.v1.cri"),
		filepath.Join(n.Root, "io.containerd.sandbox.controller.v1.shim"),
	} {
		if err := n.snapTree(s, root); err != nil {
			return err
		}
	}
	for _, pattern := range []string{
		filepath.Join(n.Dir, "ipam", n.Name, "[0-9a-f]*[.:]*"), // leases are files named by address
		// Unfinished images, and images made for one pod.
		filepath.Join(n.LayerCache, "*.tmp*"), filepath.Join(n.LayerCache, "fresh-*"), filepath.Join(n.LayerCache, "*", ".*"),
		"/var/lib/cni/results/" + n.Name + "-*",
		"/tmp/*" + n.Name + "*", "/run/*" + n.Name + "*", "/run/*/*" + n.Name + "*", "/dev/shm/*" + n.Name + "*",
	} {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, m := range matches {
			if m != "/run/netns/"+n.Name {
				s.add("file", m)
			}
		}
	}
	return nil
}

// keptFiles are what containerd makes once, on the first pod, and keeps.
var keptFiles = []string{"k8s.io", "sandboxes", "containers", "netns", "metadata.db", "sandboxstore", "t", "mounts.db"}

func (n *Node) snapTree(s snapshot, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		// Empty directories that stand for a namespace or a store are no leftovers; what is in them is.
		if path == root || d.IsDir() && (slices.Contains(keptFiles, d.Name()) || d.Name() == n.Name) {
			return nil
		}
		if !d.IsDir() && slices.Contains(keptFiles, d.Name()) {
			return nil
		}
		s.add(kindOf(d.Type()), path)
		if d.IsDir() {
			return fs.SkipDir // one leftover a directory is enough, and a rootfs may be mounted in it
		}
		return nil
	})
}

func kindOf(mode fs.FileMode) string {
	switch mode.Type() {
	case fs.ModeSocket:
		return "socket"
	case fs.ModeNamedPipe:
		return "fifo"
	case fs.ModeDir:
		return "directory"
	default:
		return "file"
	}
}

// leftBehind reports what is there of a node that has been stopped: nothing should be.
func (n *Node) leftBehind() ([]string, error) {
	s := snapshot{}
	err := errors.Join(n.snapProcesses(s), n.snapMounts(s), n.snapLoops(s))
	groups, gerr := n.cgroups()
	for _, g := range groups {
		s.add("cgroup", g)
	}
	for _, path := range []string{n.Dir, "/run/netns/" + n.Name, n.registration()} {
		var st syscall.Stat_t
		if syscall.Lstat(path, &st) == nil {
			s.add("file", path)
		}
	}
	return slices.Sorted(maps.Keys(s)), errors.Join(err, gerr)
}
