// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"net"
	"runtime/pprof"
	"time"
)

// debugTime bounds one answer on the debug socket.
const debugTime = 10 * time.Second

// debugServer answers each connection to the debug socket with the stacks of all goroutines, as text. It takes the
// place of net/http/pprof, which would be the largest part of the process.
type debugServer struct{}

// Serve until the listener fails; containerd/pkg/shim runs it when the shim was started with -debug.
func (debugServer) Serve(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		_ = conn.SetDeadline(time.Now().Add(debugTime))
		_ = pprof.Lookup("goroutine").WriteTo(conn, 2)
		_ = conn.Close()
	}
}
