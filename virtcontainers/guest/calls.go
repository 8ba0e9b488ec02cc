// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// Process names a process of the pod: a container's init, or with an exec id a further one.
type Process struct {
	Container, Exec string
}

// Ping asks the agent for a sign of life.
func (c *Client) Ping(ctx context.Context) error {
	_, err := call(ctx, c, agentv1.AgentService.Ping, &agentv1.PingRequest{})
	return err
}

// ConfigureSandbox sets the pod up; the first call after the handshake.
func (c *Client) ConfigureSandbox(ctx context.Context, req *agentv1.ConfigureSandboxRequest) error {
	_, err := call(ctx, c, agentv1.AgentService.ConfigureSandbox, req)
	return err
}

// OnlineCPUs has the guest bring so many CPUs online, in all.
func (c *Client) OnlineCPUs(ctx context.Context, count int) error {
	_, err := call(ctx, c, agentv1.AgentService.OnlineCPUs, &agentv1.OnlineCPUsRequest{Count: uint32(count)})
	return err
}

// Shutdown ends all containers and powers the guest off. It takes as long as ctx lets it.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := callLong(ctx, c, agentv1.AgentService.Shutdown, &agentv1.ShutdownRequest{})
	return err
}

// ForwardPort connects with a TCP port on the guest's loopback. errdefs.ErrFailedPrecondition: nothing listens there, or the
// guest is a confidential one.
func (c *Client) ForwardPort(ctx context.Context, port uint16, ipv6 bool) (vsock.Conn, error) {
	if c.lost != nil {
		return nil, c.lost
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, id, err := c.openStream(ctx)
	if err != nil {
		return nil, err
	}
	req := &agentv1.ForwardPortRequest{Stream: id.String(), Port: uint32(port), Ipv6: ipv6}
	if _, err := call(ctx, c, agentv1.AgentService.ForwardPort, req); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// SetClock sets the guest's wall clock.
func (c *Client) SetClock(ctx context.Context, now time.Time) error {
	_, err := call(ctx, c, agentv1.AgentService.SetClock, &agentv1.SetClockRequest{UnixNanos: now.UnixNano()})
	return err
}

// MountShared mounts the virtio-fs device with the tag. It takes as long as ctx lets it.
func (c *Client) MountShared(ctx context.Context, tag string) error {
	_, err := callLong(ctx, c, agentv1.AgentService.MountShared, &agentv1.MountSharedRequest{Tag: tag})
	return err
}

// PutVolume sends a part of a volume.
func (c *Client) PutVolume(ctx context.Context, req *agentv1.PutVolumeRequest) error {
	_, err := call(ctx, c, agentv1.AgentService.PutVolume, req)
	return err
}

// CreateContainer makes a container, up to the point where only the start is missing. It takes as long as ctx lets it.
func (c *Client) CreateContainer(ctx context.Context, req *agentv1.CreateContainerRequest) error {
	_, err := callLong(ctx, c, agentv1.AgentService.CreateContainer, req)
	return err
}

// PauseContainer freezes a container's processes.
func (c *Client) PauseContainer(ctx context.Context, id string) error {
	_, err := call(ctx, c, agentv1.AgentService.PauseContainer, &agentv1.PauseContainerRequest{ContainerId: id})
	return err
}

// ResumeContainer lets them run on.
func (c *Client) ResumeContainer(ctx context.Context, id string) error {
	_, err := call(ctx, c, agentv1.AgentService.ResumeContainer, &agentv1.ResumeContainerRequest{ContainerId: id})
	return err
}

// UpdateContainer changes a container's limits, given as the OCI specification's resources in JSON.
func (c *Client) UpdateContainer(ctx context.Context, id string, resources []byte) error {
	_, err := call(ctx, c, agentv1.AgentService.UpdateContainer, &agentv1.UpdateContainerRequest{ContainerId: id, Resources: resources})
	return err
}

// CreateProcess adds a further process to a container; it runs from its start on.
func (c *Client) CreateProcess(ctx context.Context, req *agentv1.CreateProcessRequest) error {
	_, err := call(ctx, c, agentv1.AgentService.CreateProcess, req)
	return err
}

// StartProcess lets a process run. It takes as long as ctx lets it.
func (c *Client) StartProcess(ctx context.Context, p Process) error {
	_, err := callLong(ctx, c, agentv1.AgentService.StartProcess, &agentv1.StartProcessRequest{ContainerId: p.Container, ExecId: p.Exec})
	return err
}

// WaitProcess waits until a process has ended.
func (c *Client) WaitProcess(ctx context.Context, p Process) (*agentv1.WaitProcessResponse, error) {
	return callWaiting(ctx, c, agentv1.AgentService.WaitProcess, &agentv1.WaitProcessRequest{ContainerId: p.Container, ExecId: p.Exec})
}

// SignalProcess sends a signal to a process, or with all to every process of its container.
func (c *Client) SignalProcess(ctx context.Context, p Process, signal uint32, all bool) error {
	_, err := call(ctx, c, agentv1.AgentService.SignalProcess, &agentv1.SignalProcessRequest{
		ContainerId: p.Container, ExecId: p.Exec, Signal: signal, All: all,
	})
	return err
}

// ResizeTerminal sets the size of a process's terminal.
func (c *Client) ResizeTerminal(ctx context.Context, p Process, width, height uint32) error {
	_, err := call(ctx, c, agentv1.AgentService.ResizeTerminal, &agentv1.ResizeTerminalRequest{
		ContainerId: p.Container, ExecId: p.Exec, Width: width, Height: height,
	})
	return err
}

// DeleteProcess forgets a process that has ended, and with an init its container.
func (c *Client) DeleteProcess(ctx context.Context, p Process) error {
	_, err := call(ctx, c, agentv1.AgentService.DeleteProcess, &agentv1.DeleteProcessRequest{ContainerId: p.Container, ExecId: p.Exec})
	return err
}

// DeleteContainer deletes a container whose init has ended, with all that it has in the guest. It takes as long as ctx
// lets it.
func (c *Client) DeleteContainer(ctx context.Context, id string) error {
	_, err := callLong(ctx, c, agentv1.AgentService.DeleteProcess, &agentv1.DeleteProcessRequest{ContainerId: id})
	return err
}

// DiscardContainer ends and deletes a container that its maker does not want after all.
func (c *Client) DiscardContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	init := Process{Container: id}
	if err := c.SignalProcess(ctx, init, 9, true); err == nil {
		_, _ = c.WaitProcess(ctx, init)
	}
	return c.DeleteProcess(ctx, init)
}

// ContainerStats reads a container's cgroup; it works until the container is deleted.
func (c *Client) ContainerStats(ctx context.Context, id string) (*stats.Metrics, error) {
	resp, err := call(ctx, c, agentv1.AgentService.ContainerStats, &agentv1.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		return nil, err
	}
	return metrics(resp.GetCgroup2Metrics())
}

// SandboxStats sums up the guest.
func (c *Client) SandboxStats(ctx context.Context) (*stats.Metrics, error) {
	resp, err := call(ctx, c, agentv1.AgentService.SandboxStats, &agentv1.SandboxStatsRequest{})
	if err != nil {
		return nil, err
	}
	return metrics(resp.GetCgroup2Metrics())
}

func metrics(b []byte) (*stats.Metrics, error) {
	m := &stats.Metrics{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("the agent's metrics: %w", err)
	}
	return m, nil
}

// WatchEvents calls handle for each event until ctx ends, or the connection (the error says so).
func (c *Client) WatchEvents(ctx context.Context, handle func(*agentv1.Event)) error {
	var after uint64
	for {
		resp, err := callWaiting(ctx, c, agentv1.AgentService.NextEvents, &agentv1.NextEventsRequest{After: after})
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the connection to the agent broke: %w", err)
		}
		progress := false
		for _, e := range resp.GetEvents() {
			if e.GetSequence() <= after {
				continue
			}
			after, progress = e.GetSequence(), true
			handle(e)
		}
		if !progress {
			// An agent that answers without news would make this loop spin.
			return fmt.Errorf("the agent answered NextEvents without a new event: %w", errdefs.ErrInvalidArgument)
		}
	}
}
