// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/schedcore"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/shim/bundle"
)

// DebugSocketEnv tells the daemon where its debug socket (fd 4) is, so that it can remove it.
const DebugSocketEnv = "CLOISTER_DEBUG_SOCKET"

// maxSocketPath is what fits into a sockaddr_un.
const maxSocketPath = 106

// groupLabels name the annotations that tell which pod a container belongs to, in the order in which they count.
var groupLabels = [...]string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"}

// Command is an invocation of `start`.
type Command struct {
	ID, Namespace             string
	GRPCAddress, TTRPCAddress string
	PublishBinary             string
	Debug                     bool
	// Dir is the bundle, the working directory of the invocation.
	Dir   string
	Env   []string
	Stdin io.Reader
	// DefaultSocketDir is for callers that give none; empty for containerd's own default.
	DefaultSocketDir string
	// Capabilities are announced to containerd 2.4 and later.
	Capabilities *types.MountCapabilities

	// MajorVersion, Launch and Running are MajorVersion, Launch and RunningVersion, or a test's.
	MajorVersion func(binary string) int
	Launch       func(Daemon) (*os.Process, error)
	Running      func(ctx context.Context, address string) (int32, error)
}

// Daemon is the process to be started.
type Daemon struct {
	Args, Env []string
	Dir       string
	// Files are the listening sockets, fd 3 and if wanted 4.
	Files []*os.File
}

// Start does what `start` is for and gives what is to be written to stdout, and to nowhere else.
func Start(ctx context.Context, c Command) (_ []byte, err error) {
	if c.ID == "" || c.Namespace == "" {
		return nil, fmt.Errorf("start needs -id and -namespace: %w", errdefs.ErrInvalidArgument)
	}
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	p, err := readParams(c)
	if err != nil {
		return nil, err
	}
	group, err := groupOf(c.Dir, c.ID)
	if err != nil {
		return nil, err
	}
	dir := p.socketDir
	if dir == "" {
		dir = c.DefaultSocketDir
	}
	if dir == "" {
		dir = filepath.Join(defaults.DefaultStateDir, "s")
	}
	address, err := socketAddress(ctx, dir, p.grpcAddress, group, false)
	if err != nil {
		return nil, err
	}
	// The daemon finds it when it cleans up (pkg/shim), and containerd 1.x when it restarts.
	if err := bundle.WriteAddress(c.Dir, address); err != nil {
		return nil, err
	}
	socket, version, err := listen(ctx, c, address)
	if err != nil {
		return nil, err
	}
	if socket == nil {
		return p.answer(address, version, c.Capabilities)
	}
	defer func() {
		socket.close(err != nil)
	}()
	var debugSocket *listener
	if p.debug {
		if debugSocket, err = newDebugListener(ctx, dir, p.grpcAddress, group); err != nil {
			return nil, err
		}
		defer func() { debugSocket.close(err != nil) }()
	}
	if err := bundle.WriteOptions(c.Dir, p.options); err != nil {
		return nil, err
	}
	daemon, err := c.Launch(p.daemon(c, socket, debugSocket))
	if err != nil {
		return nil, fmt.Errorf("start the shim's daemon: %w", err)
	}
	defer func() {
		if err != nil {
			_ = daemon.Kill()
			_, _ = daemon.Wait()
			return
		}
		_ = daemon.Release()
	}()
	sockets := []string{address}
	if debugSocket != nil {
		sockets = append(sockets, debugSocket.address)
	}
	if err := bundle.WriteShim(c.Dir, daemon.Pid, sockets...); err != nil {
		return nil, fmt.Errorf("remember the shim's daemon: %w", err)
	}
	// Best effort: without privilege the score cannot be lowered, and that is no reason to have no pod.
	_ = shim.AdjustOOMScore(daemon.Pid)
	return p.answer(address, apiVersion, c.Capabilities)
}

// groupOf is the id that all containers of a pod have in common.
func groupOf(dir, id string) (string, error) {
	annotations, err := bundle.Annotations(dir)
	if err != nil {
		return "", err
	}
	for _, label := range groupLabels {
		if group := annotations[label]; group != "" {
			return group, nil
		}
	}
	return id, nil
}

func socketAddress(ctx context.Context, dir, grpcAddress, group string, debug bool) (string, error) {
	address, err := shim.CreateSocketAddress(ctx, dir, grpcAddress, group, debug)
	if err != nil {
		return "", err
	}
	if path := address[len("unix://"):]; len(path) > maxSocketPath {
		return "", fmt.Errorf("the socket's path %s has %d bytes, at most %d work: "+
			"give containerd a shorter directory for the shims' sockets: %w",
			path, len(path), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	return address, nil
}

// daemon is the long-running process's command.
func (p params) daemon(c Command, socket, debugSocket *listener) Daemon {
	d := Daemon{
		Args:  []string{"-namespace", p.namespace, "-id", p.id, "-address", p.grpcAddress},
		Dir:   c.Dir,
		Files: []*os.File{socket.file},
		// Of several values of a variable the last one counts (os/exec).
		Env: append(append([]string{}, c.Env...),
			"GOMAXPROCS=4",
			"NAMESPACE="+p.namespace,
			"TTRPC_ADDRESS="+p.ttrpcAddress,
			"GRPC_ADDRESS="+p.grpcAddress,
		),
	}
	if debugSocket != nil {
		d.Args = append(d.Args, "-debug")
		d.Env = append(d.Env, DebugSocketEnv+"="+debugSocket.address)
		d.Files = append(d.Files, debugSocket.file)
	}
	return d
}

// Launch starts this binary again as the daemon.
func Launch(d Daemon) (*os.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, d.Args...)
	cmd.Dir, cmd.Env, cmd.ExtraFiles = d.Dir, d.Env, d.Files
	// A signal to containerd's process group is not for the pods.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Getenv("SCHED_CORE") != "" {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := schedcore.Create(schedcore.ProcessGroup); err != nil {
			return nil, fmt.Errorf("core scheduling, asked for by SCHED_CORE: %w", err)
		}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd.Process, nil
}

// listener is a socket that is handed to the daemon.
type listener struct {
	address string
	file    *os.File
}

// close ends this process's share in the socket; failed removes its path as well.
func (l *listener) close(failed bool) {
	_ = l.file.Close()
	if failed {
		_ = shim.RemoveSocket(l.address)
	}
}

// listen makes the socket, or returns the version of the shim that has it.
func listen(ctx context.Context, c Command, address string) (*listener, int32, error) {
	l, err := bind(address)
	if err == nil || !shim.SocketEaddrinuse(err) {
		return l, 0, err
	}
	version, runErr := c.Running(ctx, address)
	if runErr == nil {
		return nil, version, nil
	}
	// Left behind by a shim that was killed.
	if err := shim.RemoveSocket(address); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, 0, fmt.Errorf("remove the socket of a dead shim: %w", err)
	}
	l, err = bind(address)
	return l, 0, err
}

// newDebugListener makes the debug socket. Nobody but this pod's shim can have it, and it has none yet.
func newDebugListener(ctx context.Context, dir, grpcAddress, group string) (*listener, error) {
	address, err := socketAddress(ctx, dir, grpcAddress, group, true)
	if err != nil {
		return nil, err
	}
	l, err := bind(address)
	if shim.SocketEaddrinuse(err) {
		if err := shim.RemoveSocket(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		l, err = bind(address)
	}
	return l, err
}

func bind(address string) (*listener, error) {
	s, err := shim.NewSocket(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	// The path is the daemon's: closing this process's listener must not remove it.
	s.SetUnlinkOnClose(false)
	defer s.Close()
	f, err := s.File()
	if err != nil {
		_ = shim.RemoveSocket(address)
		return nil, err
	}
	return &listener{address, f}, nil
}
