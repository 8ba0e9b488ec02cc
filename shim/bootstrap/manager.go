// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/version"
	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
)

const (
	// Name of the runtime.
	Name = "io.containerd.cloister.v2"

	// allowMounts announces mount capabilities to containerd 2.2 and 2.3.
	allowMounts = "containerd.io/runtime-allow-mounts"

	// featuresType is the type URL of the OCI runtime features' JSON (containerd/core/runtime/typeurl.go).
	featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

	// statusUnknown is the exit status of what ended with its shim: as if by SIGKILL.
	statusUnknown = 128 + 9

	// shimGrace is what a daemon that was told to end gets until `delete` ends it. containerd gives `delete` 5 s.
	shimGrace = 1500 * time.Millisecond
)

// Manager does what containerd asks of the binary, for containerd/pkg/shim.
type Manager struct {
	// Cleanup removes what a pod left, from disk state: virtcontainers.Cleanup.
	Cleanup func(ctx context.Context, bundle string) error
}

var _ shim.Shim = (*Manager)(nil)

// Name of the runtime.
func (*Manager) Name() string { return Name }

// Start is never called: Start of this package is, for all dialects.
func (*Manager) Start(context.Context, *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	return nil, fmt.Errorf("start through containerd/pkg/shim: %w", errdefs.ErrNotImplemented)
}

// Stop is `delete`. It cleans up what it can, and fails only if something was left.
func (m *Manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	dir, err := bundleOf(ctx, id)
	if err != nil {
		return shim.StopStatus{}, err
	}
	status := shim.StopStatus{ExitStatus: statusUnknown, ExitedAt: time.Now()}
	err = errors.Join(bundle.EndShim(ctx, dir, shimGrace), m.Cleanup(ctx, dir))
	if err != nil {
		return shim.StopStatus{}, fmt.Errorf("clean up after %s: %w", id, err)
	}
	exit, err := bundle.ReadExit(dir)
	switch {
	case err == nil:
		status = shim.StopStatus{Pid: int(exit.PID), ExitStatus: int(exit.Status), ExitedAt: exit.At}
	case !errdefs.IsNotFound(err):
		log.G(ctx).WithError(err).Warn("the exit status that the shim kept cannot be read")
	}
	return status, nil
}

// bundleOf finds the bundle of `delete`: it is given with -bundle, and is the working directory.
func bundleOf(ctx context.Context, id string) (string, error) {
	if opts, ok := ctx.Value(shim.OptsKey{}).(shim.Opts); ok && opts.BundlePath != "" {
		return opts.BundlePath, nil
	}
	cwd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	if id == "" || id == "." || id == ".." || filepath.Base(id) != id {
		return "", fmt.Errorf("delete of id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(filepath.Dir(cwd), id), nil
}

// Info is `-info`: what the runtime is and can do. Options are given back as they came.
func (*Manager) Info(_ context.Context, stdin io.Reader) (*types.RuntimeInfo, error) {
	input, err := io.ReadAll(io.LimitReader(stdin, maxInputBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read stdin: %w", err)
	}
	if len(input) > maxInputBytes {
		return nil, fmt.Errorf("stdin has more than %d bytes: %w", maxInputBytes, errdefs.ErrInvalidArgument)
	}
	info := &types.RuntimeInfo{
		Name:        Name,
		Version:     &types.RuntimeVersion{Version: version.Version},
		Annotations: map[string]string{allowMounts: rootfs.RuntimeAllowMounts},
	}
	if len(input) > 0 {
		info.Options = &anypb.Any{}
		if err := proto.Unmarshal(input, info.Options); err != nil {
			return nil, fmt.Errorf("decode the runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	data, err := json.Marshal(guestFeatures())
	if err != nil {
		return nil, err
	}
	info.Features = &anypb.Any{TypeUrl: featuresType, Value: data}
	return info, nil
}

// guestFeatures are what a container in the guest can have. Only what is certain is listed: what is not, consumers take
// for missing.
func guestFeatures() *features.Features {
	yes, no := true, false
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		Hooks:         []string{"prestart", "createRuntime", "poststart", "poststop"},
		MountOptions:  slices.Sorted(slices.Values(append([]string{"bind", "rbind"}, wire.MountOptions...))),
		Linux: &features.Linux{
			Namespaces:      []string{"cgroup", "ipc", "mount", "network", "pid", "user", "uts"},
			Cgroup:          &features.Cgroup{V1: &no, V2: &yes, Systemd: &no, SystemdUser: &no},
			Seccomp:         &features.Seccomp{Enabled: &yes},
			Apparmor:        &features.Apparmor{Enabled: &no},
			Selinux:         &features.Selinux{Enabled: &no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &yes}},
		},
	}
}
