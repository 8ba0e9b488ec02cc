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
	type result struct {
		conn net.Conn
		err  error
	}
	dialed := make(chan result, 1)
	go func() {
		// A socket belongs to the namespace of the thread that made it. The thread is not unlocked, so it ends with
		// this goroutine and nothing else ever runs in the namespace by mistake.
		runtime.LockOSThread()
		conn, err := n.dialHere(ctx, network, address)
		dialed <- result{conn, err}
	}()
	r := <-dialed
	return r.conn, r.err
}

func (n *Node) dialHere(ctx context.Context, network, address string) (net.Conn, error) {
	ns, err := netns.GetFromName(n.Name)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", n.Name, err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return nil, fmt.Errorf("entering network namespace %s: %w", n.Name, err)
	}
	return (&net.Dialer{}).DialContext(ctx, network, address)
}
