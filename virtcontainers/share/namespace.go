// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
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

// object is what tells one thing of the host's from all others that are shared.
type object struct {
	device, inode uint64
	// readonly: as it is shared. virtiofsd has a copy of the mount, so that it cannot become writable later.
	readonly bool
	// tree is the path of a tree with further mounts in it: what is mounted there depends on the path.
	tree string

	isDir bool
}

// cloneTree copies the mounts at and below a path of the host, not attached anywhere. Closing the descriptor removes them.
func cloneTree(path string, readonly bool) (fd int, o object, err error) {
	fd, err = unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE|unix.OPEN_TREE_CLOEXEC)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return -1, o, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return -1, o, fmt.Errorf("open_tree: %w", err)
	}
	if o, err = identify(fd, path, readonly); err == nil {
		err = restrictTree(fd, readonly)
	}
	if err != nil {
		unix.Close(fd)
		return -1, object{}, err
	}
	return fd, o, nil
}

// identify tells what a copy is of.
func identify(fd int, path string, readonly bool) (object, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return object{}, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return object{}, fmt.Errorf("only directories and regular files can be shared with a VM, not a socket, pipe or device: %w",
			errdefs.ErrNotImplemented)
	}
	o := object{device: st.Dev, inode: st.Ino, readonly: readonly, isDir: kind == unix.S_IFDIR}
	if !o.isDir {
		return o, nil
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return object{}, err
	}
	below, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		inside := strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(resolved, "/")+"/")
		return !inside, inside
	})
	if err != nil {
		return object{}, fmt.Errorf("mounts of the host: %w", err)
	}
	if len(below) > 0 {
		o.tree = resolved
	}
	return o, nil
}

func restrictTree(fd int, readonly bool) error {
	// Nothing that happens here shows on the host, and nothing that the host mounts or unmounts later shows here: the guest
	// keeps what it knows open, and a mount that came from the host could not be unmounted there.
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if readonly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("mount_setattr (needs Linux 5.12): %w", err)
	}
	return nil
}
