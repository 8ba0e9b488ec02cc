// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	socketName    = "virtiofs.sock"
	maxSocketPath = 107 // of a Unix socket, in bytes
	maxLogged     = 8 << 10
)

// Config of a Share.
type Config struct {
	// Virtiofsd is the absolute path of the program: QEMU's in C or the one in Rust.
	Virtiofsd string
	// StateDir is an existing directory of the pod, absolute path; the socket is made in it. At most 93 bytes.
	StateDir string
	// ProbeDir is where it is kept what the program can do, for all pods; "" asks it anew.
	ProbeDir string
}

// Share is a running virtiofsd and what it serves.
type Share struct {
	socket string
	ns     *namespace
	served string // the served root's path in the mount namespace that virtiofsd starts in
	cmd    *exec.Cmd
	done   chan struct{} // closed when virtiofsd has ended and err is set
	err    error
	output *tail

	entries map[string]*entry // by name; used on the namespace's thread only
}

// Start runs virtiofsd with nothing shared. It accepts one connection, from the VMM, on Socket. The caller has to Close the Share.
//
// ctx is for the start only. Errors: errdefs.ErrNotFound if there is no such program, errdefs.ErrFailedPrecondition if it is not
// one that is known, errdefs.ErrInvalidArgument for paths that cannot be.
func Start(ctx context.Context, c Config) (*Share, error) {
	socket := filepath.Join(c.StateDir, socketName)
	if !filepath.IsAbs(c.StateDir) || len(socket) > maxSocketPath {
		return nil, fmt.Errorf("state directory %q is not absolute or too long for a socket (%d bytes at most): %w",
			c.StateDir, maxSocketPath-len(socketName)-1, errdefs.ErrInvalidArgument)
	}
	f, err := probe(ctx, c.Virtiofsd, c.ProbeDir)
	if err != nil {
		return nil, err
	}
	listener, err := listen(socket)
	if err != nil {
		return nil, fmt.Errorf("listen for the VMM's virtio-fs device: %w", err)
	}
	defer listener.Close() // virtiofsd has its own
	s := &Share{
		socket: socket, done: make(chan struct{}), output: &tail{max: maxLogged}, entries: map[string]*entry{},
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, os.Remove(socket))
	}
	s.ns, err = newNamespace(ctx, c.StateDir, func(served string) error {
		s.served = served
		s.cmd = exec.Command(c.Virtiofsd, f.arguments(served, 3, maxFiles())...)
		s.cmd.Dir = "/"
		s.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		s.cmd.ExtraFiles = []*os.File{listener}
		s.cmd.Stdout, s.cmd.Stderr = w, w
		// The first process of a PID namespace takes all others with it, among them the one that virtiofsd forks.
		s.cmd.SysProcAttr = &syscall.SysProcAttr{
			Pdeathsig:  syscall.SIGKILL,
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
			Setsid:     true,
		}
		if err := s.cmd.Start(); err != nil {
			return fmt.Errorf("start virtiofsd: %w", err)
		}
		return nil
	})
	w.Close()
	if err != nil {
		if s.cmd != nil && s.cmd.Process != nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		r.Close()
		return nil, errors.Join(err, os.Remove(socket))
	}
	logger := log.G(context.WithoutCancel(ctx)).WithField("virtiofsd", s.cmd.Process.Pid)
	if fault := f.shortcoming(); fault != "" {
		logger.WithField("program", c.Virtiofsd).Warnf("virtiofsd, which serves the host's directories: %s", fault)
	}
	go func() {
		defer close(s.done)
		_, _ = io.Copy(s.output, r) // until all of its processes are gone
		r.Close()
		err := s.cmd.Wait()
		s.err = fmt.Errorf("virtiofsd ended: %s: %w", s.cmd.ProcessState, errdefs.ErrUnavailable)
		if said := s.output.String(); said != "" {
			s.err = fmt.Errorf("%w; it said: %q", s.err, said)
		}
		logger.WithField("status", s.cmd.ProcessState).WithError(err).WithField("output", s.output.String()).Debug("virtiofsd ended")
	}()
	return s, nil
}

// listen makes the socket. Its file is removed by Close; a leftover of a shim that was killed is replaced.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err == nil {
		// Both programs expect a descriptor that blocks.
		if err = unix.SetNonblock(int(f.Fd()), false); err == nil {
			err = os.Chmod(path, 0o600)
		}
		if err != nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return f, nil
}

// Socket is the path of the vhost-user socket for the VMM.
func (s *Share) Socket() string { return s.socket }

// PID of virtiofsd, for the pod's cgroup. It forks one more process when the VMM connects.
func (s *Share) PID() int { return s.cmd.Process.Pid }

// Done is closed when virtiofsd has ended, by Close or by itself.
func (s *Share) Done() <-chan struct{} { return s.done }

// Err says how virtiofsd ended and what it wrote last; nil while it runs.
func (s *Share) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// Close kills virtiofsd, waits for its end and removes the socket. All shares are gone then. It can be repeated.
func (s *Share) Close(ctx context.Context) error {
	s.ns.stop() // the thread's end kills virtiofsd as well
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill virtiofsd: %w", err)
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for virtiofsd's end: %w", ctx.Err())
	}
	<-s.ns.ended
	if err := os.Remove(s.socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// tail keeps the last bytes written to it.
type tail struct {
	max int

	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
