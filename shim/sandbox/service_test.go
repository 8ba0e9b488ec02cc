// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/criv1"
	"github.com/cloister-project/cloister/shim/internal/podtest"
	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixture struct {
	*Service
	t         *testing.T
	pods      *podtest.Factory
	holder    *pods.Holder
	shutdowns atomic.Int32
	dir       string
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{t: t, pods: &podtest.Factory{}, holder: &pods.Holder{}, dir: t.TempDir()}
	f.Service = New(t.Context(), Config{
		Namespace: "k8s.io", Holder: f.holder, NewPod: f.pods.New,
		Options:    func() (*anypb.Any, error) { return nil, nil },
		AwaitExits: func(context.Context) {},
		Shutdown:   func(context.Context) { f.shutdowns.Add(1) },
	})
	t.Cleanup(func() { require.NoError(t, f.Close(context.Background())) })
	return f
}

func options(t *testing.T, c *criv1.PodSandboxConfig) *anypb.Any {
	data, err := proto.Marshal(c)
	require.NoError(t, err)
	return &anypb.Any{TypeUrl: criv1.TypeURL, Value: data}
}

func (f *fixture) create() {
	f.t.Helper()
	_, err := f.CreateSandbox(f.t.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "s", BundlePath: f.dir, NetnsPath: "/run/netns/x",
		Options: options(f.t, &criv1.PodSandboxConfig{
			Hostname:  "web",
			DnsConfig: &criv1.DNSConfig{Servers: []string{"10.0.0.10"}},
			Linux: &criv1.LinuxPodSandboxConfig{
				CgroupParent: "/kubepods/pod1",
				Sysctls:      map[string]string{"a": "b"},
				SecurityContext: &criv1.LinuxSandboxSecurityContext{
					NamespaceOptions: &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER},
				},
				Resources: &criv1.LinuxContainerResources{MemoryLimitInBytes: 1 << 30},
			},
		}),
	})
	require.NoError(f.t, err)
}

func (f *fixture) start() *sandboxapi.StartSandboxResponse {
	f.t.Helper()
	resp, err := f.StartSandbox(f.t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.NoError(f.t, err)
	return resp
}

func (f *fixture) status(verbose bool) *sandboxapi.SandboxStatusResponse {
	f.t.Helper()
	resp, err := f.SandboxStatus(f.t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: "s", Verbose: verbose})
	require.NoError(f.t, err)
	return resp
}

func TestLife(t *testing.T) {
	f := newFixture(t)
	f.create()
	cfg := f.pods.Last().Config
	require.Equal(t, "web", cfg.Hostname)
	require.Equal(t, vc.NetworkPath, cfg.Network)
	require.Equal(t, "/run/netns/x", cfg.NetNSPath)
	require.Equal(t, []string{"10.0.0.10"}, cfg.DNS.Servers)
	require.Equal(t, "/kubepods/pod1", cfg.CgroupParent)
	require.Equal(t, int64(1<<30), *cfg.Resources.Memory.Limit)
	require.Nil(t, cfg.Hooks)

	_, err := f.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: f.dir})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = f.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists, "whatever else is wrong with the request")
	require.Equal(t, "SANDBOX_NOTREADY", f.status(false).GetState())

	resp := f.start()
	require.Equal(t, uint32(podtest.PID), resp.GetPid())
	require.False(t, resp.GetCreatedAt().AsTime().IsZero())
	_, err = f.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)

	status := f.status(false)
	require.Equal(t, "SANDBOX_READY", status.GetState())
	require.Equal(t, uint32(podtest.PID), status.GetPid())
	require.Equal(t, map[string]string{"pid": "4711", "state": "SANDBOX_READY"}, status.GetInfo())
	require.NotZero(t, status.GetCreatedAt().AsTime().Unix())
	require.Nil(t, status.GetExitedAt())
	require.Equal(t, "tcg", f.status(true).GetInfo()["accelerator"])
	require.JSONEq(t, podtest.StorageUsage, f.status(true).GetInfo()["storageUsage"])

	platform, err := f.Platform(t.Context(), &sandboxapi.PlatformRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, "linux", platform.GetPlatform().GetOS())
	require.Equal(t, runtime.GOARCH, platform.GetPlatform().GetArchitecture())

	_, err = f.PingSandbox(t.Context(), &sandboxapi.PingRequest{SandboxID: "s"})
	require.NoError(t, err)
	metrics, err := f.SandboxMetrics(t.Context(), &sandboxapi.SandboxMetricsRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, "io.containerd.cgroups.v2.Metrics", metrics.GetMetrics().GetData().GetTypeUrl())
	require.Equal(t, "s", metrics.GetMetrics().GetID())

	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	go func() {
		resp, _ := f.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "s"})
		waited <- resp
	}()
	for range 2 {
		_, err = f.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "s"})
		require.NoError(t, err)
	}
	require.Zero(t, (<-waited).GetExitStatus())
	status = f.status(false)
	require.Equal(t, "SANDBOX_NOTREADY", status.GetState())
	require.NotNil(t, status.GetExitedAt())
	_, err = f.PingSandbox(t.Context(), &sandboxapi.PingRequest{SandboxID: "s"})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.Eventually(t, func() bool {
		_, err := bundle.ReadExit(f.dir)
		return err == nil
	}, 10*time.Second, time.Millisecond)

	require.Zero(t, f.shutdowns.Load())
	_, err = f.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, int32(1), f.shutdowns.Load())
}

func TestStartBeforeCreate(t *testing.T) {
	f := newFixture(t)
	_, err := f.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = f.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	for name, call := range map[string]func() error{
		"Wait": func() error {
			_, err := f.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "s"})
			return err
		},
		"Status": func() error {
			_, err := f.SandboxStatus(t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: "s"})
			return err
		},
		"Ping": func() error {
			_, err := f.PingSandbox(t.Context(), &sandboxapi.PingRequest{SandboxID: "s"})
			return err
		},
		"Metrics": func() error {
			_, err := f.SandboxMetrics(t.Context(), &sandboxapi.SandboxMetricsRequest{SandboxID: "s"})
			return err
		},
		"Update": func() error {
			_, err := f.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{SandboxID: "s"})
			return err
		},
	} {
		require.ErrorIs(t, call(), errdefs.ErrNotFound, name)
	}
}

func TestStartThatFails(t *testing.T) {
	f := newFixture(t)
	f.pods.Prepare = func(p *podtest.Pod) {
		p.OnStart = func(context.Context) error { return errdefs.ErrUnavailable }
	}
	f.create()
	_, err := f.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.Equal(t, "SANDBOX_NOTREADY", f.status(false).GetState())
	_, err = f.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	_, err = f.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, int32(1), f.shutdowns.Load())
}

func TestStartWhoseCallerLeaves(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	f.pods.Prepare = func(p *podtest.Pod) {
		p.OnStart = func(context.Context) error {
			cancel()
			return nil
		}
	}
	f.create()
	_, err := f.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, f.pods.Last().Ready())
}

func TestCreateThatFails(t *testing.T) {
	f := newFixture(t)
	for name, tt := range map[string]struct {
		r   *sandboxapi.CreateSandboxRequest
		err error
	}{
		"no id":      {&sandboxapi.CreateSandboxRequest{BundlePath: f.dir}, nil},
		"no bundle":  {&sandboxapi.CreateSandboxRequest{SandboxID: "s"}, nil},
		"options":    {&sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: f.dir, Options: &anypb.Any{TypeUrl: "x"}}, nil},
		"not a pod":  {&sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: f.dir}, errdefs.ErrInvalidArgument},
		"no options": {&sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: f.dir}, errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			f.pods.Err = tt.err
			_, err := f.CreateSandbox(t.Context(), tt.r)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Equal(t, pods.ModeNone, f.holder.Mode())
		})
	}
	// containerd ends the shim then.
	_, err := f.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, int32(1), f.shutdowns.Load())
	f.pods.Err = nil
	f.create()
	_, err = f.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "another"})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestHostNetwork(t *testing.T) {
	f := newFixture(t)
	_, err := f.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "s", BundlePath: f.dir,
		Options: options(t, &criv1.PodSandboxConfig{Linux: &criv1.LinuxPodSandboxConfig{
			SecurityContext: &criv1.LinuxSandboxSecurityContext{NamespaceOptions: &criv1.NamespaceOption{Network: criv1.NamespaceMode_NODE}},
		}}),
	})
	require.NoError(t, err)
	require.Equal(t, vc.NetworkHost, f.pods.Last().Config.Network, "the pod refuses it, or not")
}

func TestLostVM(t *testing.T) {
	f := newFixture(t)
	f.create()
	f.start()
	f.pods.Last().Lose(errors.New("QEMU was killed"))
	resp, err := f.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, uint32(137), resp.GetExitStatus())
	require.Contains(t, f.status(false).GetInfo()["error"], "QEMU was killed")
}

func TestUpdate(t *testing.T) {
	f := newFixture(t)
	f.create()
	f.start()
	update := func(extensions map[string]*anypb.Any) error {
		_, err := f.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{
			SandboxID: "s", Sandbox: &types.Sandbox{Extensions: extensions}, Fields: []string{"extensions"},
		})
		return err
	}
	require.NoError(t, update(nil))
	require.Empty(t, f.pods.Last().Updates)
	require.NoError(t, update(map[string]*anypb.Any{criv1.UpdatedResourcesKey: {
		TypeUrl: criv1.UpdatedResourcesTypeURL, Value: []byte(`{"Overhead":null,"Resources":{"cpu_quota":50000,"cpu_period":100000}}`),
	}}))
	require.Equal(t, int64(50000), *f.pods.Last().Updates[0].CPU.Quota)
	require.ErrorIs(t, update(map[string]*anypb.Any{criv1.UpdatedResourcesKey: {TypeUrl: "x"}}), errdefs.ErrInvalidArgument)
}

func TestCloseStopsThePod(t *testing.T) {
	f := newFixture(t)
	f.create()
	f.start()
	require.NoError(t, f.Close(t.Context()))
	require.False(t, f.pods.Last().Ready())
}
