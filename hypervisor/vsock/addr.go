// SPDX-License-Identifier: Apache-2.0

package vsock

import "fmt"

// Addr is the address of one end of a stream.
type Addr struct {
	// CID is the context id: HostCID, or the guest's.
	CID uint32
	// Port is the 32-bit vsock port.
	Port uint32
}

// Network implements net.Addr.
func (Addr) Network() string { return "vsock" }

// String implements net.Addr: "host:1024", "vm(3):1025".
func (a Addr) String() string {
	if a.CID == HostCID {
		return fmt.Sprintf("host:%d", a.Port)
	}
	return fmt.Sprintf("vm(%d):%d", a.CID, a.Port)
}
