// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// servedDir is the name of the served root in the tmpfs of the namespace.
const servedDir = "root"

// namespace is a thread with a mount namespace of its own. All that happens in it is done by functions sent to that thread. It
// ends when stop is called, and with it whatever has its death as a signal.
type namespace struct {
	calls   chan func()
	stopped chan struct{} // closed by stop
	ended   chan struct{} // closed when the thread takes no more calls
	stop    func()

	// Used by the thread only.
	rw     int // the tmpfs' directory of mount points, writable
	served int // the same directory as virtiofsd sees it: read-only, a shared mount
}

// newNamespace starts the thread and prepares the namespace: a tmpfs over dir, there only. then is called on the thread while it
// still has the host's tree, with the path of the served root.
func newNamespace(ctx context.Context, dir string, then func(served string) error) (*namespace, error) {
	stopped := make(chan struct{})
	n := &namespace{calls: make(chan func()), stopped: stopped, ended: make(chan struct{}), rw: -1, served: -1}
	n.stop = sync.OnceFunc(func() { close(stopped) })
	ready := make(chan error, 1)
	go func() {
		defer close(n.ended)
		// Never unlocked: the runtime ends the thread with this function.
		runtime.LockOSThread()
		err := n.prepare(ctx, dir, then)
		defer n.close()
		ready <- err
		if err != nil {
			return
		}
		for {
			select {
			case call := <-n.calls:
				call()
			case <-n.stopped:
				return
			}
		}
	}()
	if err := <-ready; err != nil {
		<-n.ended
		return nil, err
	}
	return n, nil
}

func (n *namespace) close() {
	for _, fd := range []int{n.rw, n.served} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (n *namespace) prepare(ctx context.Context, dir string, then func(served string) error) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace for shared directories: %w", err)
	}
	// Slave, so that until the host's tree is dropped below, an unmount on the host is one here, too.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separate the mount namespace from the host's: %w", err)
	}
	// A few thousand empty files and directories; contents are never written.
	if err := unix.Mount("cloister", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC,
		"mode=0755,size=1m,nr_inodes=8192"); err != nil {
		return fmt.Errorf("mount a tmpfs for shared directories: %w", err)
	}
	served := dir + "/" + servedDir
	if err := unix.Mkdir(served, 0o755); err != nil {
		return err
	}
	var err error
	if n.rw, err = unix.Open(served, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	for _, m := range []struct {
		source string
		flags  uintptr
	}{
		{served, unix.MS_BIND},
		{"", unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"", unix.MS_SHARED},
	} {
		if err := unix.Mount(m.source, served, "", m.flags, ""); err != nil {
			return fmt.Errorf("make the root of shared directories: %w", err)
		}
	}
	if n.served, err = unix.Open(served, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	if err := then(served); err != nil {
		return err
	}
	// virtiofsd runs and has a copy of the namespace. Drop the host's tree here, so that this one keeps nothing of it busy.
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		// Not possible if the host's root is the initial ramfs.
		log.G(ctx).WithError(err).Debug("keep the host's tree in the mount namespace of shared directories")
		return nil
	}
	// The old root lies over the new one (pivot_root(2), "."). Never to be seen again, so lazily.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("drop the host's tree: %w", err)
	}
	return unix.Chdir("/")
}

// do runs f on the thread and waits for its end. Once the thread has it, it is not interrupted: mounting does not wait for
// anything but the kernel, and a mount that its caller gave up would be known to nobody.
func (n *namespace) do(ctx context.Context, f func() error) error {
	result := make(chan error, 1)
	select {
	case n.calls <- func() { result <- f() }:
		return <-result
	case <-n.ended:
		return errClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errClosed = fmt.Errorf("the share is closed: %w", errdefs.ErrUnavailable)

// attach mounts a detached tree at name in the served root.
func (n *namespace) attach(tree int, name string, isDir bool) error {
	var err error
	if isDir {
		err = unix.Mkdirat(n.rw, name, 0o555)
	} else {
		err = unix.Mknodat(n.rw, name, unix.S_IFREG|0o444, 0)
	}
	if err != nil {
		return fmt.Errorf("make a mount point: %w", err)
	}
	if err := unix.MoveMount(tree, "", n.served, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return errors.Join(fmt.Errorf("move_mount: %w", err), n.unlink(name, isDir))
	}
	return nil
}

// detach is the reverse of attach. Open files of the guest stay valid.
func (n *namespace) detach(name string, isDir bool) error {
	if err := unix.Fchdir(n.served); err != nil {
		return err
	}
	err := unix.Unmount(name, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) { // not mounted any more
		err = nil
	}
	if err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	return n.unlink(name, isDir)
}

func (n *namespace) unlink(name string, isDir bool) error {
	flags := 0
	if isDir {
		flags = unix.AT_REMOVEDIR
	}
	if err := unix.Unlinkat(n.rw, name, flags); err != nil {
		return fmt.Errorf("remove a mount point: %w", err)
	}
	return nil
}
