// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// defaultShm is the size of /dev/shm if the host names none.
const defaultShm = 64 << 20

// guard stands around every request: it turns errors into gRPC statuses, once, and a panic into one of them.
func guard(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	defer func() {
		if r := recover(); r != nil {
			log.G(ctx).WithField("method", info.FullMethod).Errorf("panic in a request: %v\n%s", r, debug.Stack())
			resp, err = nil, status.Errorf(codes.Internal, "the agent failed in %s, see the guest's console: %v", info.FullMethod, r)
		}
	}()
	resp, err = method(ctx, unmarshal)
	if err == nil {
		return resp, nil
	}
	text := err.Error()
	// The code and the text are all that is sent. errgrpc would make a detail of every further kind that was wrapped on
	// the way, and clients print details as lines of their own ("internal").
	code := status.Code(errgrpc.ToGRPC(err))
	if code == codes.Unknown {
		code = codes.Internal
	}
	err = status.Error(code, text)
	if status.Code(err) == codes.Internal {
		log.G(ctx).WithField("method", info.FullMethod).WithError(err).Error("request failed")
	}
	return nil, err
}

// service is agentv1.AgentService.
type service struct{ *Server }

var _ agentv1.AgentService = (*service)(nil)

func (s *service) ConfigureSandbox(ctx context.Context, r *agentv1.ConfigureSandboxRequest) (*agentv1.ConfigureSandboxResponse, error) {
	if !wire.ValidID(r.GetSandboxId()) {
		return nil, fmt.Errorf("sandbox id %q is not valid: %w", r.GetSandboxId(), errdefs.ErrInvalidArgument)
	}
	// First, since it is made in the background while the rest goes on.
	if err := s.cfg.Storage.SetupScratch(r.GetScratchSerial()); err != nil {
		return nil, err
	}
	shm := r.GetShmBytes()
	if shm == 0 {
		shm = defaultShm
	}
	if err := s.cfg.Storage.SetupShm(shm); err != nil {
		return nil, err
	}
	if n := r.GetNetwork(); n != nil {
		if err := s.cfg.Network(ctx, n); err != nil {
			return nil, err
		}
	}
	err := s.manager.ConfigurePod(ctx, func() error {
		// The pod's alone: the guest's own uts namespace is that of containers which name none, and keeps its name.
		if r.GetHostname() != "" {
			if err := s.cfg.System.SetHostname(r.GetHostname()); err != nil {
				return err
			}
		}
		return s.cfg.System.SetSysctls(r.GetSysctls())
	})
	if err != nil {
		return nil, err
	}
	return &agentv1.ConfigureSandboxResponse{}, nil
}

func (s *service) CreateContainer(ctx context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	if err := s.manager.Create(ctx, r); err != nil {
		return nil, err
	}
	return &agentv1.CreateContainerResponse{}, nil
}

func (s *service) CreateProcess(ctx context.Context, r *agentv1.CreateProcessRequest) (*agentv1.CreateProcessResponse, error) {
	if err := s.manager.CreateProcess(ctx, r); err != nil {
		return nil, err
	}
	return &agentv1.CreateProcessResponse{}, nil
}

func (s *service) StartProcess(ctx context.Context, r *agentv1.StartProcessRequest) (*agentv1.StartProcessResponse, error) {
	pid, err := s.manager.Start(ctx, r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	return &agentv1.StartProcessResponse{Pid: uint32(pid)}, nil
}

func (s *service) WaitProcess(ctx context.Context, r *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	return s.manager.Wait(ctx, r.GetContainerId(), r.GetExecId())
}

func (s *service) SignalProcess(_ context.Context, r *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	if err := s.manager.Signal(r.GetContainerId(), r.GetExecId(), r.GetSignal(), r.GetAll()); err != nil {
		return nil, err
	}
	return &agentv1.SignalProcessResponse{}, nil
}

func (s *service) ResizeTerminal(_ context.Context, r *agentv1.ResizeTerminalRequest) (*agentv1.ResizeTerminalResponse, error) {
	if err := s.manager.Resize(r.GetContainerId(), r.GetExecId(), r.GetWidth(), r.GetHeight()); err != nil {
		return nil, err
	}
	return &agentv1.ResizeTerminalResponse{}, nil
}

func (s *service) DeleteProcess(ctx context.Context, r *agentv1.DeleteProcessRequest) (*agentv1.DeleteProcessResponse, error) {
	released, err := s.manager.Delete(ctx, r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	return &agentv1.DeleteProcessResponse{ReleasedSerials: released}, nil
}

func (s *service) PauseContainer(ctx context.Context, r *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	if err := s.manager.Pause(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &agentv1.PauseContainerResponse{}, nil
}

func (s *service) ResumeContainer(ctx context.Context, r *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	if err := s.manager.Resume(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &agentv1.ResumeContainerResponse{}, nil
}

func (s *service) UpdateContainer(ctx context.Context, r *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	if err := s.manager.Update(ctx, r.GetContainerId(), r.GetResources()); err != nil {
		return nil, err
	}
	return &agentv1.UpdateContainerResponse{}, nil
}

func (s *service) ContainerStats(_ context.Context, r *agentv1.ContainerStatsRequest) (*agentv1.ContainerStatsResponse, error) {
	metrics, err := s.manager.Stats(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	raw, err := encode(metrics)
	if err != nil {
		return nil, err
	}
	return &agentv1.ContainerStatsResponse{Cgroup2Metrics: raw}, nil
}

func (s *service) NextEvents(ctx context.Context, r *agentv1.NextEventsRequest) (*agentv1.NextEventsResponse, error) {
	events, err := s.manager.NextEvents(ctx, r.GetAfter())
	if err != nil {
		return nil, err
	}
	return &agentv1.NextEventsResponse{Events: events}, nil
}

func (s *service) Ping(context.Context, *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	return &agentv1.PingResponse{}, nil
}

func (s *service) SetClock(_ context.Context, r *agentv1.SetClockRequest) (*agentv1.SetClockResponse, error) {
	if err := s.cfg.System.SetClock(r.GetUnixNanos()); err != nil {
		return nil, err
	}
	return &agentv1.SetClockResponse{}, nil
}

func (s *service) MountShared(ctx context.Context, r *agentv1.MountSharedRequest) (*agentv1.MountSharedResponse, error) {
	if err := s.cfg.Storage.MountShared(ctx, r.GetTag()); err != nil {
		return nil, err
	}
	return &agentv1.MountSharedResponse{}, nil
}

func (s *service) PutVolume(ctx context.Context, r *agentv1.PutVolumeRequest) (*agentv1.PutVolumeResponse, error) {
	if err := s.cfg.Storage.PutVolume(ctx, r); err != nil {
		return nil, err
	}
	return &agentv1.PutVolumeResponse{}, nil
}

func (s *service) SandboxStats(context.Context, *agentv1.SandboxStatsRequest) (*agentv1.SandboxStatsResponse, error) {
	metrics, err := s.manager.PodStats()
	if err != nil {
		return nil, err
	}
	raw, err := encode(metrics)
	if err != nil {
		return nil, err
	}
	out, err := readGuestStats()
	if err != nil {
		return nil, err
	}
	out.Cgroup2Metrics = raw
	s.cfg.Storage.Usage(out)
	return out, nil
}

func (s *service) OnlineCPUs(ctx context.Context, r *agentv1.OnlineCPUsRequest) (*agentv1.OnlineCPUsResponse, error) {
	if r.GetCount() > wire.MaxCPUs {
		return nil, fmt.Errorf("%d CPUs, the limit is %d: %w", r.GetCount(), wire.MaxCPUs, errdefs.ErrInvalidArgument)
	}
	if err := s.cfg.System.OnlineCPUs(ctx, int(r.GetCount())); err != nil {
		return nil, err
	}
	return &agentv1.OnlineCPUsResponse{}, nil
}

func (s *service) UpdateNetwork(ctx context.Context, r *agentv1.UpdateNetworkRequest) (*agentv1.UpdateNetworkResponse, error) {
	if r.GetNetwork() == nil {
		return nil, fmt.Errorf("the request has no network: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.cfg.Network(ctx, r.GetNetwork()); err != nil {
		return nil, err
	}
	return &agentv1.UpdateNetworkResponse{}, nil
}

// Shutdown ends the containers first, so that their exits are told before the answer; the power goes after it, as soon
// as the host hangs up.
func (s *service) Shutdown(ctx context.Context, _ *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, closeBudget)
	defer cancel()
	s.manager.Close(ctx)
	go func() {
		timer := time.NewTimer(lastWords)
		defer timer.Stop()
		select {
		case <-s.hungUp:
		case <-timer.C:
		}
		s.stop(errShutdown)
	}()
	return &agentv1.ShutdownResponse{}, nil
}

func encode(m *stats.Metrics) ([]byte, error) {
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode statistics: %w", err)
	}
	return raw, nil
}
