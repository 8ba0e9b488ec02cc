// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/virtcontainers/guest"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
)

// RefusedError lists everything that a pod or container asks for and cannot have in a VM.
type RefusedError = refusal.Error

// NetworkMode says where a pod's network comes from.
type NetworkMode int

// Network modes.
const (
	// NetworkPath: the network namespace at PodConfig.NetNSPath, set up by CNI.
	NetworkPath NetworkMode = iota
	// NetworkNew: a new network namespace that OCI hooks may fill; else loopback only.
	NetworkNew
	// NetworkHost: the host's own namespace. A VM cannot have it; NewPod refuses.
	NetworkHost
)

// PodConfig is what a pod is made from. It is not changed after NewPod.
type PodConfig struct {
	// ID of the sandbox and its containerd namespace.
	ID        string
	Namespace string
	// Bundle is containerd's directory for the sandbox; hooks get it as their bundle.
	Bundle string
	// Config of the node, annotations already applied.
	Config *configs.Config

	Hostname  string
	Network   NetworkMode
	NetNSPath string
	// HostPID and HostIPC ask for the host's pid and ipc namespaces. A VM cannot have them; NewPod refuses.
	HostPID, HostIPC bool
	DNS              DNS
	// OwnFiles says that containers get the pod's /etc/hosts, /etc/hostname, /etc/resolv.conf and /dev/shm from the pod
	// itself. With the shim as sandboxer containerd leaves them to it (internal/cri/server: linuxContainerMounts).
	OwnFiles bool
	// Sysctls of the pod.
	Sysctls map[string]string
	// ShmBytes is the size of the pod's /dev/shm; 0 means 64 MiB.
	ShmBytes uint64
	// Resources are the pod's limits, for sizing the VM; may be nil.
	Resources *specs.LinuxResources
	// CgroupsPath is the pod's own cgroup on the host, as in the OCI specification (linux.cgroupsPath); where it is
	// empty the cgroup is made below CgroupParent, as CRI names it.
	CgroupsPath  string
	CgroupParent string
	// Hooks to run around the pod's network, with State as their input; for pods of one container made without CRI.
	Hooks       *specs.Hooks
	Annotations map[string]string
	// Only is the specification of the pod's only container, where the pod is made for it alone: what is refused in it is
	// refused before the VM starts. Nil where containers come later. OnlyRootfs is its root filesystem, as in ContainerConfig; nil
	// where it is not known yet.
	Only       *specs.Spec
	OnlyRootfs []*types.Mount

	// OnOOM is called when the OOM killer struck in a container, before the Wait of a process that it killed returns.
	// It must not block. May be nil.
	OnOOM func(containerID string)
}

// DNS of a pod.
type DNS struct {
	Servers, Searches, Options []string
}

// PodState is where a pod is in its life; see the package comment.
type PodState string

// Pod states.
const (
	PodCreated  PodState = "created"
	PodStarting PodState = "starting"
	PodReady    PodState = "ready"
	PodStopped  PodState = "stopped"
)

// PodInfo is a snapshot of a pod.
type PodInfo struct {
	ID    string
	State PodState
	// PID of the VMM on the host; 0 before Start.
	PID       uint32
	CreatedAt time.Time
	// Extra is for people: accelerator, guest kernel, boot timeline and so on.
	Extra map[string]string
}

// StorageUsage is what a pod's containers have written in the guest.
type StorageUsage = guest.StorageUsage

// Exit is the end of a process, or of a pod.
type Exit struct {
	// Status as a shell gives it: 128+signal for a signalled process. 137 when the VM was lost.
	Status uint32
	At     time.Time
	// Err tells why, where there is more to say than the status: a VM that died, for example.
	Err error
}

// ContainerConfig is what a container is made from.
type ContainerConfig struct {
	ID     string
	Bundle string
	// Spec as containerd wrote it for the host. Nothing of it reaches the guest before the allow-list.
	Spec *specs.Spec
	// Rootfs as in CreateTaskRequest. Without mounts it is the directory of the specification's root.
	Rootfs []*types.Mount
	Stdio  Stdio
	IO     ProcessIO
	// HooksDone says that Spec.Hooks' create hooks ran with the pod (PodConfig.Hooks).
	HooksDone bool
}

// Stdio says which streams a process has.
type Stdio struct {
	Stdin, Stdout, Stderr bool
	Terminal              bool
	// Width and Height of the terminal; zero if unknown.
	Width, Height uint32
}

// ProcessIO moves a process's bytes between the guest and wherever its owner wants them.
type ProcessIO interface {
	// Attach is called once, before the process starts, with a stream for each that Stdio asked for, nil for the others.
	// It takes the streams over and must not block.
	Attach(stdin, stdout, stderr vsock.Conn)
	// Drain waits until at least so many bytes of output were delivered, or all there will ever be, or ctx ends.
	Drain(ctx context.Context, stdoutBytes, stderrBytes uint64)
	// Close ends all relays and releases what they hold. Idempotent; also called when Attach never was.
	Close() error
}

// ExecConfig is a further process in a container.
type ExecConfig struct {
	ID      string
	Process *specs.Process
	Stdio   Stdio
	IO      ProcessIO
}

// ProcessStatus is where a process is in its life.
type ProcessStatus string

// Process states.
const (
	ProcessCreated ProcessStatus = "created"
	ProcessRunning ProcessStatus = "running"
	ProcessPaused  ProcessStatus = "paused"
	ProcessStopped ProcessStatus = "stopped"
)

// ProcessState is a snapshot of a process.
type ProcessState struct {
	Status ProcessStatus
	// PID that stands for the process on the host: that of its container's stand-in (package standin), 0 before that is made.
	// It is nobody's any more once the init has ended.
	PID uint32
	// Exit is valid when Status is ProcessStopped.
	Exit  Exit
	Stdio Stdio
}
