// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/log"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
	"github.com/cloister-project/cloister/virtcontainers/share"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// VM is what mounts need of the pod's VM (hypervisor.VM).
type VM interface {
	AddSharedDirectory(ctx context.Context, f hypervisor.SharedDirectory) error
	Done() <-chan struct{}
}

// Guest is what mounts need of the pod's agent (guest.Client).
type Guest interface {
	MountShared(ctx context.Context, tag string) error
	PutVolume(ctx context.Context, req *agentv1.PutVolumeRequest) error
}

// Config is what a pod's mounts need of the pod.
type Config struct {
	VM    VM
	Guest Guest
	// MemoryBytes of the VM.
	MemoryBytes uint64
	Files       PodFiles
	// StateDir is the sandbox's directory on the host; Virtiofsd finds the program.
	StateDir  string
	Virtiofsd func() (string, error)
	// Adopt puts a process into the pod's cgroup.
	Adopt func(ctx context.Context, pid int) error
	// Run starts a goroutine that ends with the context that it is given, and that the pod's end waits for.
	Run func(func(context.Context))
	// Lost is called when the guest has lost the host's directories for good.
	Lost func(error)
	// Hotplug bounds a device's way into the guest, Cleanup the end of virtiofsd.
	Hotplug, Cleanup time.Duration
}

// Set is the mounts of one pod's containers.
type Set struct {
	cfg     Config
	volumes *volumes.Set

	// turn is held (one element) while share is made; share is written under it and read by its owner, or after all users
	// have gone.
	turn  chan struct{}
	share *share.Share
}

// New returns a Set that has made nothing yet.
func New(cfg Config) *Set {
	return &Set{cfg: cfg, volumes: volumes.NewSet(cfg.Guest.PutVolume, cfg.Run), turn: make(chan struct{}, 1)}
}

// Attach turns a container's mounts into what the agent mounts. undo takes the steps that give back what was made, also
// when Attach fails half-way. Everything that turns out not to be had is gathered into one *refusal.Error.
func (s *Set) Attach(ctx context.Context, all []Mount, undo func(step func(context.Context))) ([]*agentv1.Mount, error) {
	var (
		out     []*agentv1.Mount
		reasons []string
		copied  int
	)
	for _, m := range all {
		made, err := s.attach(ctx, m, undo)
		more, fault := refusal.Reasons(err)
		if fault != nil {
			return nil, fault
		}
		reasons = append(reasons, more...)
		for _, mount := range made {
			copied += len(mount.GetFile().GetContent())
		}
		out = append(out, made...)
	}
	if copied > wire.MaxFileCopies {
		reasons = append(reasons, fmt.Sprintf("%d bytes of files to copy; the limit is %d", copied, wire.MaxFileCopies))
	}
	if len(reasons) > 0 {
		return nil, refusal.Of(reasons)
	}
	return out, nil
}

// attach makes what one mount needs: nothing, if nothing is to be mounted, or more than one mount of the guest's, in order.
func (s *Set) attach(ctx context.Context, m Mount, undo func(step func(context.Context))) ([]*agentv1.Mount, error) {
	g := &agentv1.Mount{Destination: m.Destination, Options: m.Options}
	var err error
	switch m.Kind {
	case GuestFilesystem:
		g.Source = filesystem(m.Filesystem)
	case PodShm:
		g.Source = &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}
	case CgroupView:
		g.Source = filesystem("cgroup")
	case PodFile:
		g.Source, err = file(s.cfg.Files.file(m))
	case Live:
		return s.live(ctx, m, undo)
	case Copied:
		g.Options = readOnly(m.Options)
		if g.Source, err = s.copied(ctx, m); s.orLive(ctx, m, err) {
			return s.live(ctx, m, undo)
		}
	case Part:
		g.Options = readOnly(m.Options)
		if err = s.part(ctx, m, g); s.orLive(ctx, m, err) {
			return s.live(ctx, m, undo)
		}
	case Scratch:
		g.Source, err = s.scratch(m)
	case TerminationLog:
		g.Source, err = file(terminationLog(m))
	case ImageVolume:
		g, err = imageVolume(m, g)
	default:
		return nil, refused("%s", m.Reason)
	}
	if err != nil || g == nil {
		return nil, err
	}
	g.IdMapped = !m.IDs.IsZero() && m.Kind != ImageVolume // which is made in the user namespace
	return []*agentv1.Mount{g}, nil
}

// orLive reports whether a volume that cannot be copied is shared instead.
func (s *Set) orLive(ctx context.Context, m Mount, err error) bool {
	if err == nil || !m.OrLive || ctx.Err() != nil {
		return false
	}
	log.G(ctx).WithError(err).Warnf("the volume at %s is shared with the host and not copied: programs see its changes, and are not told",
		m.Destination)
	return true
}

func filesystem(kind string) *agentv1.Mount_Filesystem {
	return &agentv1.Mount_Filesystem{Filesystem: &agentv1.GuestFilesystem{Type: kind}}
}

func file(c *agentv1.FileCopy, err error) (*agentv1.Mount_File, error) {
	return &agentv1.Mount_File{File: c}, err
}
