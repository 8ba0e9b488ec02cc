// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/runtime-spec/specs-go"

	vc "github.com/cloister-project/cloister/virtcontainers"
)

// Pod is a *virtcontainers.Pod; its methods are documented there.
type Pod interface {
	Start(ctx context.Context) error
	Stop(ctx context.Context) error
	Done() <-chan struct{}
	Exit() vc.Exit
	Info() vc.PodInfo
	Ping(ctx context.Context) error
	Stats(ctx context.Context) (*stats.Metrics, error)
	StorageUsage(ctx context.Context) (*vc.StorageUsage, error)
	Update(ctx context.Context, r *specs.LinuxResources) error
	CreateContainer(ctx context.Context, cfg vc.ContainerConfig) (Container, error)
}

// Container is a *virtcontainers.Container.
type Container interface {
	Init() Process
	Exec(ctx context.Context, cfg vc.ExecConfig) (Process, error)
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Update(ctx context.Context, r *specs.LinuxResources) error
	Stats(ctx context.Context) (*stats.Metrics, error)
	Delete(ctx context.Context) (vc.Exit, error)
}

// Process is a *virtcontainers.Process.
type Process interface {
	Start(ctx context.Context) error
	Kill(ctx context.Context, signal uint32, all bool) error
	Resize(ctx context.Context, width, height uint32) error
	State() vc.ProcessState
	Wait(ctx context.Context) (vc.Exit, error)
	Delete(ctx context.Context) (vc.Exit, error)
}

// NewFunc makes a pod; it only checks.
type NewFunc func(ctx context.Context, cfg vc.PodConfig) (Pod, error)

// New is the NewFunc of package virtcontainers.
func New(ctx context.Context, cfg vc.PodConfig) (Pod, error) {
	p, err := vc.NewPod(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return pod{p}, nil
}

// The adapters differ from what they hold only in the types of results.
type (
	pod       struct{ *vc.Pod }
	container struct{ *vc.Container }
)

func (p pod) CreateContainer(ctx context.Context, cfg vc.ContainerConfig) (Container, error) {
	c, err := p.Pod.CreateContainer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return container{c}, nil
}

func (c container) Init() Process { return c.Container.Init() }

func (c container) Exec(ctx context.Context, cfg vc.ExecConfig) (Process, error) {
	p, err := c.Container.Exec(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return p, nil
}
