// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/network"
)

// maxName is the length of a thread's name in bytes.
const maxName = 15

// Thread stands for one container.
type Thread struct {
	tid     int
	release chan struct{}
	left    chan struct{}
	once    sync.Once
}

// Start makes a thread whose name begins as the container's id does, in the network namespace netns and with a root of
// OpenRoot's.
func Start(id string, netns, root *os.File) (*Thread, error) {
	t := &Thread{release: make(chan struct{}), left: make(chan struct{})}
	ready := make(chan error, 1)
	go func() {
		defer close(t.left)
		if err := network.Inside(netns, func() error { return t.stay(id, root, ready) }); err != nil {
			ready <- err
		}
	}()
	if err := <-ready; err != nil {
		<-t.left
		return nil, fmt.Errorf("process id for a container: %w", err)
	}
	return t, nil
}

// stay runs on the thread, until Close. It gives ready a nil; an error it returns.
func (t *Thread) stay(id string, root *os.File, ready chan<- error) error {
	home, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	// The thread ends by itself soon after Close, but not before it: see network.NewNetns.
	defer unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
	if err := present(id, root); err != nil {
		return err
	}
	t.tid = unix.Gettid()
	ready <- nil
	<-t.release
	return nil
}

// OpenRoot opens a directory, made in dir, that exists nowhere any more: nothing can be made in it. The caller closes it.
func OpenRoot(dir string) (*os.File, error) {
	path, err := os.MkdirTemp(dir, "root-")
	if err != nil {
		return nil, fmt.Errorf("root of stand-ins: %w", err)
	}
	root, err := os.Open(path)
	if rerr := os.Remove(path); err == nil && rerr != nil {
		root.Close()
		err = rerr
	}
	if err != nil {
		return nil, fmt.Errorf("root of stand-ins: %w", err)
	}
	return root, nil
}

// present changes what /proc shows of the thread that runs it.
func present(id string, root *os.File) error {
	if err := os.WriteFile("/proc/thread-self/comm", []byte(id[:min(len(id), maxName)]), 0); err != nil {
		return fmt.Errorf("name a thread: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("give a thread a root of its own: %w", err)
	}
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change a thread's root (needs CAP_SYS_CHROOT): %w", err)
	}
	return nil
}

// TID is the thread's id. It works wherever /proc/PID is read; it is no process that could be waited for.
func (t *Thread) TID() int { return t.tid }

// Close ends the thread, soon after it returns. It may be repeated.
func (t *Thread) Close() {
	t.once.Do(func() { close(t.release) })
	<-t.left
}
