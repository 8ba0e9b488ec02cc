// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// NetNS makes a network namespace with a tap in it. The tap is the caller's to close.
func NetNS(t testing.TB) (ns, tap *os.File) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	type result struct {
		ns, tap *os.File
		err     error
	}
	got := make(chan result)
	supervise.OnOwnThread(func() {
		var r result
		defer func() { got <- r }()
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err != nil {
			return
		}
		if r.ns, r.err = os.Open("/proc/thread-self/ns/net"); r.err != nil {
			return
		}
		if r.tap, r.err = os.OpenFile("/dev/net/tun", os.O_RDWR, 0); r.err != nil {
			return
		}
		ifr, err := unix.NewIfreq("tap0")
		if err != nil {
			r.err = err
			return
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		r.err = unix.IoctlIfreq(int(r.tap.Fd()), unix.TUNSETIFF, ifr)
	})
	r := <-got
	if r.err != nil {
		for _, f := range []*os.File{r.ns, r.tap} {
			if f != nil {
				f.Close()
			}
		}
		t.Skipf("no network namespace with a tap here: %v", r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	return r.ns, r.tap
}
