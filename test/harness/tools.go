// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
)

// Ctr prepares ctr in the node's network namespace, in the containerd namespace Node.Name, so that what is made carries
// the node's name in its cgroups. Use `-n` first to override it.
func (n *Node) Ctr(ctx context.Context, args ...string) *exec.Cmd {
	return n.Command(ctx, append(n.ctrLine(n.Name), args...)...)
}

// Crictl prepares crictl. It must run in the node's network namespace: streams come from containerd's own address there.
func (n *Node) Crictl(ctx context.Context, args ...string) *exec.Cmd {
	return n.Command(ctx, append(n.crictlLine(), args...)...)
}

// Nerdctl prepares nerdctl with its data below the node's directory. Give `run` a `--network Node.Name`, the pods' network:
// nerdctl's own default network is there, but needs more of iptables.
func (n *Node) Nerdctl(ctx context.Context, args ...string) *exec.Cmd {
	return n.Command(ctx, append(n.nerdctlLine(), args...)...)
}

// Command prepares any command in the node's network namespace with the node's PATH. It is killed when ctx ends.
func (n *Node) Command(ctx context.Context, line ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + n.Name, "--"}, line...)...)
	cmd.Env = n.env()
	cmd.Dir = n.Dir
	return cmd
}

func (n *Node) ctrLine(namespace string) []string {
	return []string{filepath.Join(n.artifacts.Conformance, "ctr"), "--address", n.Socket, "-n", namespace}
}

func (n *Node) crictlLine() []string {
	return []string{
		filepath.Join(n.artifacts.Conformance, "crictl"), "--timeout", "120s",
		"--runtime-endpoint", "unix://" + n.Socket, "--image-endpoint", "unix://" + n.Socket,
	}
}

func (n *Node) nerdctlLine() []string {
	return []string{
		filepath.Join(n.artifacts.Conformance, "nerdctl"), "--address", n.Socket, "--namespace", n.Name,
		"--data-root", filepath.Join(n.Dir, "nerdctl"), "--cgroup-manager", "cgroupfs",
		"--cni-path", n.artifacts.Conformance, "--cni-netconfpath", n.nerdctlNetworks(),
		"--hosts-dir", filepath.Join(n.Dir, "certs.d"),
	}
}

// nerdctlNetworks is a CNI directory of nerdctl's own: it adds a default network there, which CRI must not pick up.
// The node's network is in it too, for `nerdctl run --network Node.Name`.
func (n *Node) nerdctlNetworks() string { return filepath.Join(n.Dir, "nerdctl-cni") }

// Usage are shell lines that work with a kept node: ctr, crictl, nerdctl.
func (n *Node) Usage() (ctr, crictl, nerdctl string) {
	enter := []string{"nsenter", "--net=/run/netns/" + n.Name}
	join := func(line []string) string { return strings.Join(append(enter[:2:2], line...), " ") }
	// What the CRI made is in the namespace k8s.io.
	return join(n.ctrLine("k8s.io")), join(n.crictlLine()), join(n.nerdctlLine())
}
