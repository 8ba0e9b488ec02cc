// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/ocispec"
	"github.com/cloister-project/cloister/internal/idmap"
)

const (
	pauseID = "pause"
	// pauseSuffix makes the name of the pause process's cgroup from that of the containers' parent.
	pauseSuffix = "-pause"
	// pauseUser is nobody; the pause process needs no right at all.
	pauseUser = 65534
)

// pod holds what containers share: the namespaces, each pinned by an open file. The agent itself stays outside of them.
type pod struct {
	ipc, uts *os.File
	mqueue   string // where the IPC namespace's message queues are mounted

	// turn is held (one element) by join, which is the only one to use what follows before close.
	turn chan struct{}
	// gone is closed when the pod ends.
	gone      chan struct{}
	users     map[idmap.Map]userNamespace
	pid       *os.File
	pidIDs    idmap.Map
	pause     *libcontainer.Container
	pauseDone chan struct{}
}

// nsPath names a pinned namespace for libcontainer, which opens it in a child of this process.
func nsPath(f *os.File) string {
	if f == nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

// ConfigurePod makes the namespaces that containers share. It runs setup on a thread inside of them, where it sets the
// hostname and the sysctls. The pid namespace, with a pause process as its init, is made for the first container that asks for it.
// It must be called once, before the first container; after an error it may be tried again.
func (m *Manager) ConfigurePod(ctx context.Context, setup func() error) (err error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return errShutsDown()
	}
	if m.pod != nil || m.configuring {
		m.mu.Unlock()
		return fmt.Errorf("the pod is configured already: %w", errdefs.ErrFailedPrecondition)
	}
	m.configuring = true
	m.mu.Unlock()
	p := &pod{
		mqueue: filepath.Join(m.cfg.StateDir, "mqueue"),
		turn:   make(chan struct{}, 1), gone: make(chan struct{}), users: map[idmap.Map]userNamespace{},
	}
	defer func() {
		if err != nil {
			p.close()
			p = nil
		}
		m.mu.Lock()
		m.pod, m.configuring = p, false
		m.mu.Unlock()
	}()
	if err := p.unshare(setup); err != nil {
		return err
	}
	return ctx.Err()
}

// unshare makes the IPC and UTS namespaces on a thread of its own.
func (p *pod) unshare(setup func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is in the pod's namespaces and must not run anything else. It ends with the goroutine.
		runtime.LockOSThread()
		result <- func() (err error) {
			if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
				return fmt.Errorf("make the pod's ipc and uts namespaces: %w", err)
			}
			if setup != nil {
				if err := setup(); err != nil {
					return err
				}
			}
			if p.ipc, err = os.Open("/proc/thread-self/ns/ipc"); err != nil {
				return err
			}
			if p.uts, err = os.Open("/proc/thread-self/ns/uts"); err != nil {
				return err
			}
			if err := os.MkdirAll(p.mqueue, 0o755); err != nil {
				return err
			}
			if err := unix.Mount("mqueue", p.mqueue, "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
				// A kernel without POSIX message queues: containers that mount them get the kernel's error.
				p.mqueue = ""
			}
			return nil
		}()
	}()
	return <-result
}

// startPause runs the agent's executable as a container with an empty root and no rights: a container in the pod's pid
// namespace sees it as PID 1 and must not find a way through it (/proc/1/root) into the guest.
//
// users is a path of the user namespace that the pid namespace shall belong to; empty for the guest's own.
func (p *pod) startPause(stateDir, cgroup, users string) (err error) {
	defer func() {
		if err != nil {
			p.stopPause()
		}
	}()
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	root := filepath.Join(stateDir, "root")
	for _, dir := range []string{"dev", "proc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, pausePath), nil, 0o444); err != nil {
		return err
	}
	// Without an oom_score_adj it keeps the agent's: the pod does not outlive it.
	process := &specs.Process{
		Args:            []string{pausePath, pauseArg},
		Cwd:             "/",
		User:            specs.User{UID: pauseUser, GID: pauseUser},
		Capabilities:    &specs.LinuxCapabilities{},
		NoNewPrivileges: true,
	}
	namespaces := []specs.LinuxNamespace{
		{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}, {Type: specs.PIDNamespace},
		{Type: specs.IPCNamespace, Path: nsPath(p.ipc)}, {Type: specs.UTSNamespace, Path: nsPath(p.uts)},
	}
	if users != "" {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: users})
		process.User = specs.User{} // its root: others may not be mapped
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: pauseID, Spec: &specs.Spec{
		Version: specs.Version,
		Process: process,
		Root:    &specs.Root{Path: root, Readonly: true},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			// libcontainer makes /dev/null in it and opens it: that needs a filesystem with devices, which the root is not on.
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "mode=0755", "size=64k"}},
			{Destination: pausePath, Type: "bind", Source: exe, Options: []string{"bind", "ro", "nosuid", "nodev"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroup,
			Resources:   &specs.LinuxResources{Devices: ocispec.DeviceRules(nil)},
			Namespaces:  namespaces,
		},
	}})
	if err != nil {
		return err
	}
	if p.pause, err = libcontainer.Create(stateDir, pauseID, config); err != nil {
		return err
	}
	ready, stdout, err := newPipe(true, 0, 0)
	if err != nil {
		return err
	}
	defer ready.Close()
	defer stdout.Close()
	lp := ocispec.LibcontainerProcess(process)
	lp.Init, lp.Stdout = true, stdout
	if err := p.pause.Run(lp); err != nil {
		return err
	}
	done := make(chan struct{})
	p.pauseDone = done
	go func() {
		defer close(done)
		_, _ = lp.Wait()
	}()
	pid, err := lp.Pid()
	if err != nil {
		return err
	}
	// It says so when it runs; its end closes the pipe. Nothing can be started in the namespace of a dead init.
	_ = stdout.Close()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("it ended at once (is the agent linked statically?): %w", err)
	}
	p.pid, err = os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	return err
}

// stopPause takes back as much of startPause as there is.
func (p *pod) stopPause() {
	if p.pauseDone != nil {
		_ = p.pause.Signal(unix.SIGKILL)
		<-p.pauseDone
	}
	if p.pause != nil {
		_ = p.pause.Destroy()
	}
	p.pause, p.pauseDone = nil, nil
}

// close undoes ConfigurePod and join.
func (p *pod) close() {
	close(p.gone)
	p.turn <- struct{}{} // for good
	p.stopPause()
	for _, u := range p.users {
		_ = u.file.Close()
		_ = os.Remove(u.path)
	}
	for _, f := range []*os.File{p.ipc, p.uts, p.pid} {
		if f != nil {
			_ = f.Close()
		}
	}
	if p.mqueue != "" {
		_ = unix.Unmount(p.mqueue, unix.MNT_DETACH)
	}
}
