// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netns"
)

// Dial connects to an address (IP and port, no name) in the node's network namespace: to a pod, as another pod or a
// node's process would. It fits http.Transport.DialContext.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return inNetns(n.Name, func() (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) })
}

// Listen listens on an address (IP and port, no name) in the node's network namespace.
func (n *Node) Listen(network, address string) (net.Listener, error) {
	return inNetns(n.Name, func() (net.Listener, error) { return net.Listen(network, address) })
}

// inNetns makes a socket in the network namespace of this name.
func inNetns[T any](name string, socket func() (T, error)) (T, error) {
	type result struct {
		socket T
		err    error
	}
	made := make(chan result, 1)
	go func() {
		// A socket belongs to the namespace of the thread that made it. The thread is not unlocked, so it ends with
		// this goroutine and nothing else ever runs in the namespace by mistake.
		runtime.LockOSThread()
		var r result
		if r.err = enterNetns(name); r.err == nil {
			r.socket, r.err = socket()
		}
		made <- r
	}()
	r := <-made
	return r.socket, r.err
}

func enterNetns(name string) error {
	ns, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("entering network namespace %s: %w", name, err)
	}
	return nil
}
