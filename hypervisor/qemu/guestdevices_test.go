// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/abi"
)

// deviceModules drive every device that a document can have, in the order in which they are loaded.
var deviceModules = append(append([]string{}, scsiModules...),
	"failover", "net_failover", "virtio_net", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport")

// guestDocument is testDocument for any architecture.
func guestDocument(t *testing.T, arch hypervisor.Architecture, do string, modules ...string) hypervisor.Document {
	t.Helper()
	if arch == hypervisor.ArchAMD64 {
		return testDocument(t, testKernel(t), testInitrd(t, modules...), do)
	}
	kernel := os.Getenv(s390xKernelVariable)
	if kernel == "" {
		t.Skip(s390xKernelVariable + " (the path of a raw s390x kernel) is not set")
	}
	doc := testDocument(t, kernel, testInitrdFor(t, arch, modules...), do)
	doc.Architecture, doc.SharedDirectories = arch, 0
	doc.Boot.Parameters = append(New(Config{Arch: arch}).KernelParameters(doc.Accelerator), "init.do="+do)
	return doc
}

// TestGuestDevices boots real guests under emulation and looks from inside at every device. The confidential ones are
// of the platform sample: the rules and no protection.
func TestGuestDevices(t *testing.T) {
	for name, tc := range map[string]struct {
		arch         hypervisor.Architecture
		confidential bool
		// As testdata/init prints them: 1 is the network, 8 SCSI, 0x13 vsock.
		devices string
	}{
		"amd64, sample": {hypervisor.ArchAMD64, true, "pci/0x0001/1/1,pci/0x0008/1/1,pci/0x0013/1/1"},
		"s390x":         {hypervisor.ArchS390X, false, "ccw/0x0001/1/0,ccw/0x0008/1/0,pci/0x0013/1/0"},
		"s390x, sample": {hypervisor.ArchS390X, true, "ccw/0x0001/1/1,ccw/0x0008/1/1,pci/0x0013/1/0"}, // see builder.vsock
	} {
		t.Run(name, func(t *testing.T) {
			d := driverFor(t, tc.arch)
			doc := guestDocument(t, tc.arch, "devices", deviceModules...)
			if tc.confidential {
				doc.SharedDirectories, doc.Confidential = 0, &hypervisor.Confidential{Platform: abi.Sample}
			}
			doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1400}}
			ns, tap := testNetNS(t)
			dir, ctx := t.TempDir(), context.Background()
			disks := []hypervisor.Disk{testDisk(t, dir, 0), testDisk(t, dir, 1), testDisk(t, dir, 2)}
			doc.Disks = disks[:1]

			start := time.Now()
			h, err := d.Start(ctx, doc, hypervisor.Resources{StateDir: t.TempDir(), NetNS: ns, Taps: map[string]*os.File{"eth0": tap}})
			require.NoError(t, err)
			v := h.(*vm)
			defer func() {
				v.Kill()
				if t.Failed() {
					t.Log(v.Exit())
				}
			}()
			l, err := v.Vsock().Listen(1024)
			require.NoError(t, err)
			defer l.Close()
			heard := make(chan string, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					heard <- err.Error()
					return
				}
				defer conn.Close()
				words := make([]byte, 64)
				n, _ := conn.Read(words)
				_, _ = conn.Write([]byte("hello"))
				heard <- string(words[:n])
				_, _ = conn.Read(words) // until the guest has the answer and closes
			}()
			require.NoError(t, v.AddDisk(ctx, disks[1]), "before the guest runs")
			require.NoError(t, v.Boot(ctx))
			waitConsole(t, v, "INIT up")
			t.Logf("init after %v", time.Since(start))
			require.Equal(t, "VIRTIO "+tc.devices+".", strings.TrimSpace(waitConsole(t, v, "VIRTIO ")))
			require.Equal(t, "VSOCK hello.", strings.TrimSpace(waitConsole(t, v, "VSOCK ")))
			require.Equal(t, "I am "+string(tc.arch), <-heard)

			if tc.confidential && tc.arch == hypervisor.ArchAMD64 {
				requireNoRoom(ctx, t, v)
			}
			waitConsole(t, v, expectedDisks(disks[:2]))
			require.NoError(t, v.AddDisk(ctx, disks[2]))
			waitConsole(t, v, expectedDisks(disks))
			require.NoError(t, v.RemoveDisk(ctx, disks[0].ID))
			waitConsole(t, v, expectedDisks(disks[1:]))
			requireClosed(t, v, disks[0].Path)
		})
	}
}

// requireNoRoom asks QEMU for what a confidential VM must not get while it runs. The machine was made without room for it.
func requireNoRoom(ctx context.Context, t *testing.T, v *vm) {
	t.Helper()
	require.NoError(t, v.qmp.Execute(ctx, "object-add", map[string]any{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20},
		nil))
	for _, device := range []map[string]any{
		{"driver": "pc-dimm", "id": "x", "memdev": "more"},
		{"driver": "max-x86_64-cpu", "id": "x", "socket-id": 0, "core-id": 1, "thread-id": 0},
		{"driver": "virtio-mem-pci", "id": "x", "memdev": "more"},
		{"driver": "virtio-pmem-pci", "id": "x", "memdev": "more"},
		{"driver": "virtio-balloon-pci", "id": "x"},
		{"driver": "virtio-rng-pci", "id": "x"},
	} {
		err := v.qmp.Execute(ctx, "device_add", device, nil)
		require.Error(t, err, device["driver"])
		t.Logf("%s: %v", device["driver"], err)
	}
	require.NoError(t, v.qmp.Execute(ctx, "object-del", map[string]any{"id": "more"}, nil))
}

// TestS390XGuestEnds: the ways in which a guest ends are told apart on the other machine too.
func TestS390XGuestEnds(t *testing.T) {
	d := driverFor(t, hypervisor.ArchS390X)
	for do, want := range map[string]hypervisor.Exit{
		"poweroff": {Reason: hypervisor.ExitStopped, Detail: "the guest powered off"},
		"panic":    {Reason: hypervisor.ExitGuestPanic, Detail: "Kernel panic - not syncing: sysrq triggered crash"},
		"reset":    {Reason: hypervisor.ExitGuestPanic, Detail: "the guest reset itself, without a kernel panic on its console"},
	} {
		t.Run(do, func(t *testing.T) {
			v := startGuest(t, d, guestDocument(t, hypervisor.ArchS390X, do))
			require.NoError(t, v.Boot(context.Background()))
			exit := waitEnd(t, v)
			require.Equal(t, want.Reason, exit.Reason, exit.Error())
			require.Equal(t, want.Detail, exit.Detail)
			require.Contains(t, exit.Console, "INIT up")
		})
	}
}

// TestSealedImageNotUnpacked starts the real boot loader of a Secure Execution image where there is no Secure Execution:
// it says so on the console.
func TestSealedImageNotUnpacked(t *testing.T) {
	d := driverFor(t, hypervisor.ArchS390X)
	stubs := os.Getenv("CLOISTER_TEST_SE_STUBS")
	if stubs == "" {
		t.Skip("CLOISTER_TEST_SE_STUBS (the directory of stage3a.bin) is not set")
	}
	stage3a, err := os.ReadFile(filepath.Join(stubs, "stage3a.bin"))
	require.NoError(t, err)
	image := make([]byte, 0x20000)
	copy(image, []byte{0x00, 0x08, 0x00, 0x01, 0x80, 0x01, 0x10, 0x00}) // a short PSW: start at 0x11000
	copy(image[0x10000:], stage3a)
	path := filepath.Join(t.TempDir(), "sealed")
	require.NoError(t, os.WriteFile(path, image, 0o600))

	doc := guestDocument(t, hypervisor.ArchS390X, "")
	doc.Boot = hypervisor.Boot{Kernel: path, Sealed: true}
	v := startGuest(t, d, doc)
	require.NoError(t, v.Boot(context.Background()))
	exit := waitEnd(t, v)
	require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
	require.Contains(t, exit.Console, "Secure unpack facility is not available", "for the platform to explain")
}

// TestGuestBootsWithFirmware: the firmware starts the bzImage, with every device under the rules of a confidential VM.
func TestGuestBootsWithFirmware(t *testing.T) {
	firmware, kernel := os.Getenv("CLOISTER_TEST_OVMF"), os.Getenv(kernelVariable)
	if firmware == "" || kernel == "" {
		t.Skipf("CLOISTER_TEST_OVMF (the path of OVMF.fd) or %s is not set", kernelVariable)
	}
	d := driverFor(t, hypervisor.ArchAMD64)
	doc := guestDocument(t, hypervisor.ArchAMD64, "poweroff")
	doc.SharedDirectories, doc.Confidential = 0, &hypervisor.Confidential{Platform: abi.Sample}
	doc.Boot.Firmware, doc.Boot.Kernel = firmware, kernel
	v := startGuest(t, d, doc)
	start := time.Now()
	require.NoError(t, v.Boot(context.Background()))
	exit := waitEnd(t, v)
	t.Logf("from firmware to power-off %v", time.Since(start))
	require.Equal(t, "the guest powered off", exit.Detail, exit.Error())
	require.Contains(t, exit.Console, "INIT up")
}
