// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloister-project/cloister/internal/procid"
)

// baseDir holds the nodes' directories: short, for the sake of socket paths, and on a disk even where /tmp is in memory.
const baseDir = "/var/tmp"

// startBudget is how long containerd may take until its CRI answers and is ready.
const startBudget = 60 * time.Second

// Options of [Start].
type Options struct {
	// Artifacts as [Locate] found them.
	Artifacts Artifacts
	// Handlers are those that the node serves, all if empty. What only others need does not have to exist, see
	// [Artifacts.Check]. The first one is containerd's default; of all, it is runc.
	Handlers []string
	// DropIn is laid over the generated cloister.toml.
	DropIn string
	// Containerd is the directory of another containerd, of 2.0 or later; empty: the one of tools/conformance. Before 2.4 its shims
	// have their sockets in /run/containerd/s.
	Containerd string
}

// Node is a private containerd; see the package comment.
type Node struct {
	// Name is that of the network namespace, the CNI network, its bridge, the cgroup parent and the containerd
	// namespace of things made without CRI; the directory's last element.
	Name string
	// Dir holds everything of the node.
	Dir string
	// Root and State are containerd's directories, Socket its gRPC address.
	Root, State, Socket string
	// CloisterConfig is the configuration of Cloister's handlers that have none of their own; CloisterState and LayerCache what it sets there.
	CloisterConfig, CloisterState, LayerCache string
	// Handlers are those that it serves; all, if empty.
	Handlers []string
	// Containerd is as in [Options].
	Containerd string
	// Owner is the process that started the node, 0 for a node that is kept beyond its owner's end.
	Owner int

	artifacts  Artifacts
	containerd *daemon
	cri        *CRI
	baseline   snapshot
	stopped    bool
}

// Start makes a node and waits until its CRI is ready. If it fails nothing is left.
func Start(ctx context.Context, opts Options) (_ *Node, err error) {
	if os.Getuid() != 0 {
		return nil, errors.New("a node needs root: network namespaces, mounts and cgroups are made for it")
	}
	if err := opts.Artifacts.Check(opts.Handlers...); err != nil {
		return nil, err
	}
	name := "cl" + randomHex(3)
	dir := filepath.Join(baseDir, name)
	n := &Node{
		Name:           name,
		Dir:            dir,
		Root:           filepath.Join(dir, "root"),
		State:          filepath.Join(dir, "state"),
		Socket:         filepath.Join(dir, "containerd.sock"),
		CloisterConfig: filepath.Join(dir, "cloister", "cloister.toml"),
		CloisterState:  filepath.Join(dir, "cl"),
		LayerCache:     filepath.Join(dir, "layers"),
		Handlers:       opts.Handlers,
		Containerd:     opts.Containerd,
		Owner:          os.Getpid(),
		artifacts:      opts.Artifacts,
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err := n.register(); err != nil {
		return nil, err
	}
	for _, sub := range []string{"tmp", "logs", "s", "ipam", "certs.d", "opt", "cdi", "cni", "nerdctl-cni"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o711); err != nil {
			return nil, err
		}
	}
	if err := n.writeConfig(); err != nil {
		return nil, err
	}
	if opts.DropIn != "" {
		if err := n.WriteDropIn("50-options", opts.DropIn); err != nil {
			return nil, err
		}
	}
	if err := n.makeNetns(ctx); err != nil {
		return nil, err
	}
	if err := n.StartContainerd(ctx); err != nil {
		return nil, err
	}
	if n.baseline, err = n.takeSnapshot(); err != nil {
		return nil, err
	}
	return n, nil
}

// makeNetns makes the node's network namespace. Duplicate address detection is off in it: there can be no duplicates,
// and until it is done, a second or two, a connection gets a source address that nobody answers to.
func (n *Node) makeNetns(ctx context.Context) error {
	if err := run(ctx, "ip", "netns", "add", n.Name); err != nil {
		return err
	}
	if err := run(ctx, "ip", "-n", n.Name, "link", "set", "lo", "up"); err != nil {
		return err
	}
	const noDAD = "for which in all default; do echo 0 > /proc/sys/net/ipv6/conf/$which/accept_dad; done"
	return run(ctx, "nsenter", "--net=/run/netns/"+n.Name, "--", "sh", "-c", noDAD)
}

// StartContainerd starts containerd in the node, which must not have one, and waits until its CRI is ready.
func (n *Node) StartContainerd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startBudget)
	defer cancel()
	binary := filepath.Join(n.artifacts.Conformance, "containerd")
	if n.Containerd != "" {
		binary = filepath.Join(n.Containerd, "containerd")
	}
	if err := os.Remove(n.containerdPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(binary, n.containerdPath()); err != nil {
		return err
	}
	cmd := exec.Command("nsenter", "--net=/run/netns/"+n.Name, "--", n.containerdPath(), "--config", n.configPath())
	cmd.Env = n.env()
	cmd.Dir = n.Dir
	d, err := startDaemon(cmd, n.logPath())
	if err != nil {
		return err
	}
	n.containerd = d
	if n.cri == nil {
		if n.cri, err = dialCRI(n); err != nil {
			return err
		}
	}
	if err := n.awaitReady(ctx, d); err != nil {
		return fmt.Errorf("containerd is not ready: %w; the end of its log %s:\n%s", err, n.logPath(), n.LogTail(30))
	}
	return nil
}

// UseContainerd makes the next StartContainerd start another containerd, as in [Options], with the same state. None runs now.
func (n *Node) UseContainerd(dir string) error {
	n.Containerd = dir
	if err := n.register(); err != nil {
		return err
	}
	return n.writeConfig()
}

// ContainerdEnded is closed when the containerd that runs now has ended, by whatever ended it.
func (n *Node) ContainerdEnded() <-chan struct{} { return n.containerd.done }

// ContainerdName is the name that the node's containerd has as a process, and no other process of the machine has.
func (n *Node) ContainerdName() string { return n.Name + "d" }

// containerdPath is a link to containerd: whoever kills processes by name shall find this one alone.
func (n *Node) containerdPath() string { return filepath.Join(n.Dir, n.ContainerdName()) }

// StopContainerd ends containerd alone: its shims and their pods live on. With SIGKILL if hard is set, else in order.
func (n *Node) StopContainerd(ctx context.Context, hard bool) error {
	if n.containerd == nil {
		return nil
	}
	err := n.containerd.stop(ctx, hard)
	n.containerd = nil
	return err
}

// CRI is the client of the node's CRI. It reconnects by itself when containerd is restarted.
func (n *Node) CRI() *CRI { return n.cri }

// Artifacts are what the node was made of.
func (n *Node) Artifacts() Artifacts { return n.artifacts }

// Stop ends the node and everything in it, and removes its directory. It may be repeated, and is meant to clean up after
// any failure: it takes nothing for granted and reports what it could not undo.
func (n *Node) Stop(ctx context.Context) error {
	var faults []error
	if n.cri != nil {
		faults = append(faults, n.cri.conn.Close())
		n.cri = nil
	}
	faults = append(faults,
		n.StopContainerd(ctx, false),
		n.killAll(ctx),
		n.unmountAll(),
		n.detachLoops(ctx),
		n.deleteNetns(ctx),
		n.removeCgroups(ctx),
		removeMatches("/var/lib/cni/results/"+n.Name+"-*"),
	)
	if err := errors.Join(faults...); err != nil {
		// The directory stays: it has the logs, and what is mounted in it must not be removed through the mount.
		return fmt.Errorf("stopping node %s: %w", n.Dir, err)
	}
	if err := os.RemoveAll(n.Dir); err != nil {
		return err
	}
	n.stopped = true
	return n.unregister()
}

// Keep leaves the node to whoever stops it with [Stop] on what [Registered] lists, beyond this process's end.
func (n *Node) Keep() error {
	n.Owner = 0
	return n.register()
}

// Registered lists the nodes of this cache that were kept, or whose owner is gone.
func Registered() ([]*Node, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(cache, "nodes", "cl*.json"))
	if err != nil {
		return nil, err
	}
	var nodes []*Node
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		n := &Node{}
		if err := json.Unmarshal(data, n); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if n.Name+".json" != filepath.Base(file) || n.Dir != filepath.Join(baseDir, n.Name) {
			return nil, fmt.Errorf("%s does not describe a node", file)
		}
		n.artifacts.Cache = cache
		if n.Owner == 0 || !procid.Alive(n.Owner) {
			nodes = append(nodes, n)
		}
	}
	return nodes, nil
}

func (n *Node) registration() string {
	return filepath.Join(n.artifacts.Cache, "nodes", n.Name+".json")
}

func (n *Node) register() error {
	data, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(n.registration()), 0o700); err != nil {
		return err
	}
	return os.WriteFile(n.registration(), data, 0o600)
}

func (n *Node) unregister() error {
	if err := os.Remove(n.registration()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (n *Node) configPath() string { return filepath.Join(n.Dir, "config.toml") }

// env is the environment of containerd, and so of its shims: a PATH by which it finds its own peers first.
func (n *Node) env() []string {
	path := []string{n.artifacts.Bin, n.artifacts.Conformance}
	if n.artifacts.MkfsErofs != "" {
		path = append(path, filepath.Dir(n.artifacts.MkfsErofs))
	}
	path = append(path, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
	return []string{"PATH=" + strings.Join(path, ":"), "TMPDIR=" + filepath.Join(n.Dir, "tmp"), "HOME=" + os.Getenv("HOME")}
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
