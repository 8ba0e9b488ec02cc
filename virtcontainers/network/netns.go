// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// errNotNetns tells a path that holds something else, such as the empty file that is left when the namespace's bind
// mount is gone.
var errNotNetns = errors.New("is not a network namespace")

// Open opens the network namespace at path, which is a bind mount (/run/netns/x) or a link in /proc. The caller closes
// the file; while it is open, the namespace lives. The host's own namespace gives HostNetworkError, a missing one
// errdefs.ErrNotFound, anything that is no network namespace errdefs.ErrInvalidArgument.
func Open(path string) (*os.File, error) {
	if path == "" {
		return nil, HostNetworkError()
	}
	f, err := open(path)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("network namespace %s does not exist (was the pod's network torn down?): %w", path, errdefs.ErrNotFound)
	case errors.Is(err, errNotNetns):
		return nil, fmt.Errorf("%s %w: %w", path, err, errdefs.ErrInvalidArgument)
	default:
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	host, err := isHost(f)
	if err == nil && host {
		err = HostNetworkError()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// NS_GET_NSTYPE is asked only of nsfs: its number may mean something else to a device.
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("statfs %s: %w", path, err)
	}
	if st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, errNotNetns
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, errNotNetns
	}
	return f, nil
}

// isHost reports whether ns is the network namespace of this process or of PID 1. In either case, mirroring its
// interfaces into a guest would cut the host off.
func isHost(ns *os.File) (bool, error) {
	st, err := ns.Stat()
	if err != nil {
		return false, fmt.Errorf("stat network namespace: %w", err)
	}
	// The main thread's, not the calling thread's: see onThread. PID 1's may be unreadable in a container.
	for _, p := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		if own, err := os.Stat(p); err == nil && os.SameFile(st, own) {
			return true, nil
		}
	}
	return false, nil
}

// onThread runs f on an OS thread of its own and waits for it. f may change the thread's namespaces at will: the thread
// ends with f (runtime.LockOSThread: a goroutine that ends locked takes its thread along). It is never the main thread,
// whose namespaces are what /proc/<pid>/ns shows and which cannot end.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onThread(f) // this goroutine holds the main thread meanwhile
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// Inside runs f on a thread that is in the namespace.
func Inside(ns *os.File, f func() error) error {
	var err error
	onThread(func() {
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = f()
	})
	runtime.KeepAlive(ns)
	return err
}

// handle is a netlink handle whose sockets are in the namespace; the caller closes it.
func handle(ns *os.File) (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	runtime.KeepAlive(ns)
	if err != nil {
		return nil, fmt.Errorf("netlink in network namespace: %w", err)
	}
	return h, nil
}

// Namespace is a network namespace made by NewNetns.
type Namespace struct {
	file    *os.File
	tid     int
	release chan struct{}
	left    chan struct{}
	once    sync.Once
}

// NewNetns makes a network namespace whose loopback is up, for containers whose OCI spec wants a new one and names no
// path (ctr run, nerdctl run).
//
// A thread of this process stays in the namespace until Close, so that /proc/<TID>/ns/net is a valid path: OCI hooks
// that set the network up (nerdctl's createRuntime hook) get TID as the state's pid. The namespace lives until Close,
// and as long as others hold it.
func NewNetns() (*Namespace, error) {
	n := &Namespace{release: make(chan struct{}), left: make(chan struct{})}
	ready := make(chan error, 1)
	go onThread(func() {
		defer close(n.left)
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			ready <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- fmt.Errorf("make network namespace (needs CAP_SYS_ADMIN): %w", err)
			return
		}
		// The thread ends by itself soon after Close, but not before it: leaving the namespace now is what makes
		// "closed" mean "not held".
		defer unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			ready <- fmt.Errorf("open new network namespace: %w", err)
			return
		}
		n.file, n.tid = f, unix.Gettid()
		ready <- nil
		<-n.release
	})
	if err := <-ready; err != nil {
		<-n.left
		return nil, err
	}
	if err := n.loopbackUp(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Namespace) loopbackUp() error {
	h, err := handle(n.file)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set loopback up in new network namespace: %w", err)
	}
	return nil
}

// File is the namespace; it belongs to n.
func (n *Namespace) File() *os.File { return n.file }

// TID is the id of the thread that stays in the namespace. It works wherever /proc/<pid>/ns/net is read; it is no
// process that could be signalled or waited for.
func (n *Namespace) TID() int { return n.tid }

// Path names the namespace for other processes. It is valid until Close.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/%d/ns/net", n.tid) }

// Close lets the thread leave and closes the file. It may be repeated.
func (n *Namespace) Close() error {
	var err error
	n.once.Do(func() {
		close(n.release)
		<-n.left
		err = n.file.Close()
	})
	return err
}
