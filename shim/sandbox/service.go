// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/criv1"
	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

const (
	// stateReady and stateNotReady are names of CRI's PodSandboxState. containerd takes any other word for "not ready".
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"

	// stopTime bounds the stop of a pod that nobody waits for.
	stopTime = time.Minute
	// usageTime bounds the guest's answer to what it has on its disk, which a status can do without.
	usageTime = 2 * time.Second
	// exitsTime bounds the wait until the containers' exits were published.
	exitsTime = 5 * time.Second
)

// Config of the service.
type Config struct {
	// Namespace of containerd that the shim serves.
	Namespace string
	Holder    *pods.Holder
	NewPod    pods.NewFunc
	// Options are the runtime options that the shim was started with; nil for none.
	Options func() (*anypb.Any, error)
	// OnOOM as in virtcontainers.PodConfig.
	OnOOM func(containerID string)
	// AwaitExits waits until the exits of all containers were published, or ctx ends.
	AwaitExits func(ctx context.Context)
	// Shutdown ends the process once the request of ctx was answered. It is safe to repeat.
	Shutdown func(ctx context.Context)
}

// Service implements the Sandbox service. Its errors are errdefs kinds; whoever registers it turns them into statuses.
type Service struct {
	Config

	life    context.Context
	endLife context.CancelFunc
	running sync.WaitGroup

	mu     sync.Mutex
	bundle string
}

var _ sandboxapi.TTRPCSandboxService = (*Service)(nil)

// New makes the service. ctx carries the logger; Close ends the service.
func New(ctx context.Context, c Config) *Service {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	return &Service{Config: c, life: life, endLife: end}
}

// Close stops the sandbox and ends the service's goroutines.
func (s *Service) Close(ctx context.Context) error {
	var err error
	if pod, _, mode, gerr := s.Holder.Get(); gerr == nil && mode == pods.ModeSandbox {
		if err = pod.Stop(ctx); err == nil {
			s.awaitExits(ctx)
		}
	}
	s.endLife()
	s.running.Wait()
	return err
}

// RegisterTTRPC registers the service.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	sandboxapi.RegisterTTRPCSandboxService(server, s)
	return nil
}

// pod returns the sandbox of an id; errdefs.ErrNotFound if it was not created here.
func (s *Service) pod(id string) (pods.Pod, error) {
	pod, have, mode, err := s.Holder.Get()
	if err != nil || mode != pods.ModeSandbox || have != id {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return pod, nil
}

// CreateSandbox checks the configuration of a pod and keeps it.
func (s *Service) CreateSandbox(ctx context.Context, r *sandboxapi.CreateSandboxRequest) (_ *sandboxapi.CreateSandboxResponse, err error) {
	id := r.GetSandboxID()
	// First of all: a second call is told that the sandbox is there, whatever else is wrong with it.
	if err := s.Holder.Claim(pods.ModeSandbox, id); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Holder.Release()
		}
	}()
	if id == "" || !filepath.IsAbs(r.GetBundlePath()) {
		return nil, fmt.Errorf("a sandbox needs an id and the absolute path of a bundle, got %q and %q: %w", id, r.GetBundlePath(),
			errdefs.ErrInvalidArgument)
	}
	config, err := criv1.Decode(r.GetOptions())
	if err != nil {
		return nil, err
	}
	options, err := s.Options()
	if err != nil {
		return nil, err
	}
	cfg, err := pods.FromCRI(ctx, pods.Request{
		ID: id, Namespace: s.Namespace, Bundle: r.GetBundlePath(), Options: options, OnOOM: s.OnOOM,
	}, config, r.GetNetnsPath(), r.GetAnnotations())
	if err != nil {
		return nil, err
	}
	pod, err := s.NewPod(ctx, cfg)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.bundle = r.GetBundlePath()
	s.mu.Unlock()
	s.Holder.Set(pod)
	return &sandboxapi.CreateSandboxResponse{}, nil
}

// StartSandbox boots the pod.
func (s *Service) StartSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, fmt.Errorf("start before create: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err := pod.Start(ctx); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		// The caller has left and takes the sandbox for one that did not start.
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		if err := pod.Stop(stopCtx); err != nil {
			log.G(ctx).WithError(err).Error("a sandbox whose start was given up cannot be stopped")
		}
		return nil, fmt.Errorf("start sandbox %s: %w", r.GetSandboxID(), ctx.Err())
	}
	s.running.Go(func() { s.keepExit(pod) })
	info := pod.Info()
	return &sandboxapi.StartSandboxResponse{Pid: info.PID, CreatedAt: timestamppb.New(info.CreatedAt)}, nil
}

// keepExit waits for the pod's end and keeps it for `delete`.
func (s *Service) keepExit(pod pods.Pod) {
	select {
	case <-pod.Done():
	case <-s.life.Done():
		return
	}
	s.mu.Lock()
	dir := s.bundle
	s.mu.Unlock()
	exit := pod.Exit()
	if err := bundle.WriteExit(dir, bundle.Exit{PID: pod.Info().PID, Status: exit.Status, At: exit.At}); err != nil {
		log.G(s.life).WithError(err).Warn("the sandbox's exit status is not kept for `delete`")
	}
}

// Platform is what containers are to be made for.
func (s *Service) Platform(context.Context, *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the pod. It is safe to repeat, and works for a sandbox that was never started. The request's timeout
// is not used: the node's configuration bounds a stop, after which the VM is killed.
func (s *Service) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	if s.Holder.Mode() == pods.ModeNone {
		return &sandboxapi.StopSandboxResponse{}, nil
	}
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	if err := pod.Stop(ctx); err != nil {
		return nil, err
	}
	s.awaitExits(ctx)
	return &sandboxapi.StopSandboxResponse{}, nil
}

func (s *Service) awaitExits(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, exitsTime)
	defer cancel()
	s.AwaitExits(ctx)
}

// WaitSandbox returns when the pod has ended.
func (s *Service) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	select {
	case <-pod.Done():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	exit := pod.Exit()
	return &sandboxapi.WaitSandboxResponse{ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

// SandboxStatus describes the pod.
func (s *Service) SandboxStatus(ctx context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	info := pod.Info()
	resp := &sandboxapi.SandboxStatusResponse{
		SandboxID: r.GetSandboxID(), Pid: info.PID, State: stateNotReady, CreatedAt: timestamppb.New(info.CreatedAt),
		Info: map[string]string{},
	}
	if r.GetVerbose() {
		maps.Copy(resp.Info, info.Extra)
		if info.State == vc.PodReady {
			s.addUsage(ctx, pod, resp.Info)
		}
	}
	if info.State == vc.PodReady {
		resp.State = stateReady
	}
	select {
	case <-pod.Done():
		exit := pod.Exit()
		resp.ExitedAt = timestamppb.New(exit.At)
		if exit.Err != nil {
			resp.Info["error"] = exit.Err.Error()
		}
	default:
	}
	resp.Info["pid"] = strconv.FormatUint(uint64(info.PID), 10)
	resp.Info["state"] = resp.State
	return resp, nil
}

// addUsage tells what the containers have written, as JSON: CRI's stats take a writable layer's usage from the snapshotter, on
// the host, and cgroup metrics have no place for it.
func (s *Service) addUsage(ctx context.Context, pod pods.Pod, info map[string]string) {
	ctx, cancel := context.WithTimeout(ctx, usageTime)
	defer cancel()
	usage, err := pod.StorageUsage(ctx)
	if err == nil {
		var text []byte
		if text, err = json.Marshal(usage); err == nil {
			info["storageUsage"] = string(text)
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("what the pod's containers have written is not known")
	}
}

// PingSandbox asks the guest for a sign of life.
func (s *Service) PingSandbox(ctx context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	if err := pod.Ping(ctx); err != nil {
		return nil, err
	}
	return &sandboxapi.PingResponse{}, nil
}

// ShutdownSandbox ends the pod and then this process, whatever state they are in: containerd calls it for sandboxes
// that failed to start as well.
func (s *Service) ShutdownSandbox(ctx context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	// Without a pod, CreateSandbox failed or was given up.
	if _, _, _, err := s.Holder.Get(); err == nil {
		pod, err := s.pod(r.GetSandboxID())
		if err != nil {
			return nil, err
		}
		// Also for a caller that leaves as soon as it has asked: the process ends next.
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		if err := pod.Stop(stopCtx); err != nil {
			// The VMM ends with this process, and `delete` sees to the rest.
			log.G(ctx).WithError(err).Error("stop of the sandbox at its shutdown")
		} else {
			s.awaitExits(stopCtx)
		}
	}
	s.Shutdown(ctx)
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

// SandboxMetrics are the guest's as a whole, as cgroup v2 metrics.
func (s *Service) SandboxMetrics(ctx context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	metrics, err := pod.Stats(ctx)
	if err != nil {
		return nil, err
	}
	data, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{
		Timestamp: timestamppb.Now(), ID: r.GetSandboxID(), Data: data,
	}}, nil
}

// UpdateSandbox changes the pod's limits (containerd 2.4, a pod's resize in place). Other changes of containerd's
// record of the sandbox mean nothing here.
func (s *Service) UpdateSandbox(ctx context.Context, r *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	pod, err := s.pod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	extension, ok := r.GetSandbox().GetExtensions()[criv1.UpdatedResourcesKey]
	if !ok {
		return &sandboxapi.UpdateSandboxResponse{}, nil
	}
	update, err := criv1.DecodeUpdate(extension)
	if err != nil {
		return nil, err
	}
	if resources := pods.Resources(update.Resources); resources != nil {
		if err := pod.Update(ctx, resources); err != nil {
			return nil, err
		}
	}
	return &sandboxapi.UpdateSandboxResponse{}, nil
}
