// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/tee/abi"
)

// TestGuestDevices boots real guests under emulation and looks from inside at every device. The confidential ones are
// of the platform sample: the rules and no protection.
func TestGuestDevices(t *testing.T) {
	for name, tc := range map[string]struct {
		arch         hypervisor.Architecture
		confidential bool
		// As the guest's init prints them: 1 is the network, 8 SCSI, 0x13 vsock.
		devices string
	}{
		"amd64, sample": {hypervisor.ArchAMD64, true, "pci/0x0001/1/1,pci/0x0008/1/1,pci/0x0013/1/1"},
		"s390x":         {hypervisor.ArchS390X, false, "ccw/0x0001/1/0,ccw/0x0008/1/0,pci/0x0013/1/0"},
		"s390x, sample": {hypervisor.ArchS390X, true, "ccw/0x0001/1/1,ccw/0x0008/1/1,pci/0x0013/1/0"}, // see builder.vsock
	} {
		t.Run(name, func(t *testing.T) {
			d := driverFor(t, tc.arch)
			doc := guestDocument(t, d, "devices", vmtest.DeviceModules...)
			if tc.confidential {
				doc.SharedDirectories, doc.Confidential = 0, &hypervisor.Confidential{Platform: abi.Sample}
			}
			doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1400}}
			ns, tap := vmtest.NetNS(t)
			dir, ctx := t.TempDir(), context.Background()
			disks := []hypervisor.Disk{vmtest.Disk(t, dir, 0), vmtest.Disk(t, dir, 1), vmtest.Disk(t, dir, 2)}
			doc.Disks = disks[:1]

			start := time.Now()
			v := vmtest.Start(t, d, doc, hypervisor.Resources{NetNS: ns, Taps: map[string]*os.File{"eth0": tap}})
			heard := v.Greet(t)
			require.NoError(t, v.AddDisk(ctx, disks[1]), "before the guest runs")
			require.NoError(t, v.Boot(ctx))
			v.WaitConsole(t, "INIT up")
			t.Logf("init after %v", time.Since(start))
			require.Equal(t, "VIRTIO "+tc.devices+".", v.WaitConsole(t, "VIRTIO "))
			require.Equal(t, "VSOCK hello.", v.WaitConsole(t, "VSOCK "))
			require.Equal(t, "I am "+string(tc.arch), <-heard)

			if tc.confidential && tc.arch == hypervisor.ArchAMD64 {
				requireNoRoom(ctx, t, v.VM.(*vm))
			}
			v.WaitConsole(t, vmtest.DisksLine(disks[:2]))
			require.NoError(t, v.AddDisk(ctx, disks[2]))
			v.WaitConsole(t, vmtest.DisksLine(disks))
			require.NoError(t, v.RemoveDisk(ctx, disks[0].ID))
			v.WaitConsole(t, vmtest.DisksLine(disks[1:]))
			v.RequireClosed(t, disks[0].Path)
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
			v := startGuest(t, d, guestDocument(t, d, do))
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

	doc := guestDocument(t, d, "")
	doc.Boot = hypervisor.Boot{Kernel: path, Sealed: true}
	v := startGuest(t, d, doc)
	require.NoError(t, v.Boot(context.Background()))
	exit := waitEnd(t, v)
	require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
	require.Contains(t, exit.Console, "Secure unpack facility is not available", "for the platform to explain")
}

// TestGuestBootsWithFirmware: the firmware starts the bzImage, with every device under the rules of a confidential VM.
func TestGuestBootsWithFirmware(t *testing.T) {
	firmware := os.Getenv("CLOISTER_TEST_OVMF")
	if firmware == "" {
		t.Skip("CLOISTER_TEST_OVMF (the path of OVMF.fd) is not set")
	}
	d := driverFor(t, hypervisor.ArchAMD64)
	doc := guestDocument(t, d, "poweroff")
	doc.SharedDirectories, doc.Confidential = 0, &hypervisor.Confidential{Platform: abi.Sample}
	doc.Boot.Firmware, doc.Boot.Kernel = firmware, vmtest.KernelImage(t, hypervisor.ArchAMD64)
	v := startGuest(t, d, doc)
	start := time.Now()
	require.NoError(t, v.Boot(context.Background()))
	exit := waitEnd(t, v)
	t.Logf("from firmware to power-off %v", time.Since(start))
	require.Equal(t, "the guest powered off", exit.Detail, exit.Error())
	require.Contains(t, exit.Console, "INIT up")
}
