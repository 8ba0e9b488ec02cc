// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// testNetNS makes a network namespace with a tap in it.
func testNetNS(t *testing.T) (ns, tap *os.File) {
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
		t.Skipf("no network namespace with a tap here: %v", r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	return r.ns, r.tap
}

func TestStartInNetNS(t *testing.T) {
	ns, tap := testNetNS(t)
	d := testDriver(t)
	doc := testDocument(t, testKernel(t), testInitrd(t), "idle")
	doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1400}}
	before, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)

	h, err := d.Start(context.Background(), doc, hypervisor.Resources{
		StateDir: t.TempDir(), NetNS: ns, Taps: map[string]*os.File{"eth0": tap},
	})
	require.NoError(t, err)
	defer h.Kill()
	var want unix.Stat_t
	require.NoError(t, unix.Fstat(int(ns.Fd()), &want))
	got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.PID()))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("net:[%d]", want.Ino), got)
	require.ErrorIs(t, tap.Close(), os.ErrClosed, "Start took it over")
	after, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	require.Equal(t, before, after)

	// When QEMU is gone, no thread of this process is left in the namespace.
	h.Kill()
	require.Eventually(t, func() bool {
		tasks, err := os.ReadDir("/proc/self/task")
		require.NoError(t, err)
		for _, task := range tasks {
			if to, _ := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); to == got {
				return false
			}
		}
		return true
	}, 10*time.Second, time.Millisecond)
}

// The command line for KVM is taken by the real binary. Whether the guest runs is for a machine with hardware behind
// KVM; a software KVM does not even have the registers of -cpu host.
func TestStartWithKVM(t *testing.T) {
	d := testDriver(t)
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	f.Close()
	doc := testDocument(t, testKernel(t), testInitrd(t), "idle")
	doc.Accelerator, doc.CPU.Model = hypervisor.AccelKVM, new(Driver).DefaultCPU(hypervisor.AccelKVM)
	if _, err := d.Accelerator(context.Background(), "kvm"); err != nil {
		doc.CPU.Model = "qemu64"
	}
	v := startGuest(t, d, doc)
	v.Kill()
}
