// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/tee/abi"
)

// values of all occurrences of an option.
func values(args []string, option string) (all []string) {
	for i := range len(args) - 1 {
		if args[i] == option {
			all = append(all, args[i+1])
		}
	}
	return all
}

func TestEmulatedGolden(t *testing.T) {
	line, err := newEmulatedLine(goldenCases()["tdx-unix"].doc, newestFeatures())
	require.NoError(t, err)
	args := line.args
	got, golden := strings.Join(args, "\n")+"\n", filepath.Join("testdata", "tdx-emulated.golden")
	if *update {
		require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), got, "run with -update if the change is meant")
}

// What ACPI tables depend on must be as in the launch, whatever the launch becomes.
func TestEmulatedIsTheLaunchedMachine(t *testing.T) {
	for _, name := range []string{"tdx-minimal", "tdx-unix", "tdx-vsock"} {
		t.Run(name, func(t *testing.T) {
			c := goldenCases()[name]
			launch := c.commandLine(t, c.features)
			line, err := newEmulatedLine(c.doc, c.features)
			require.NoError(t, err)
			args := line.args
			require.Equal(t, []string{strings.TrimSuffix(values(launch.args, "-machine")[0], ",confidential-guest-support="+teeObjectID) +
				",pic=off"},
				values(args, "-machine"))
			for _, option := range []string{"-uuid", "-smp", "-m", "-bios", "-kernel", "-initrd", "-append", "-sandbox"} {
				require.Equal(t, values(launch.args, option), values(args, option), option)
			}
			require.Equal(t, values(launch.args, "-object")[:1], values(args, "-object"), "the memory, and nothing else")
			require.Len(t, values(args, "-serial"), len(values(launch.args, "-serial")))
			require.Len(t, values(args, "-blockdev"), len(values(launch.args, "-blockdev")))

			devices, stand := values(launch.args, "-device"), values(args, "-device")
			require.Len(t, stand, len(devices))
			for i, d := range devices {
				if !strings.Contains(d, "vsock") {
					require.Equal(t, d, stand[i])
					continue
				}
				kept := d[strings.Index(d, ","):]
				kept = kept[:strings.Index(kept, ",iommu_platform=on")+len(",iommu_platform=on")]
				require.Contains(t, kept, "addr=0x3.0x0,romfile=,disable-legacy=on")
				require.Equal(t, vsockStandIn+"-pci"+kept, stand[i], "the same place and the same rules")
			}

			all := strings.Join(args, "\n")
			for _, gone := range []string{"fd=", "kvm", "-chardev", "tap,", "confidential-guest-support", typeTDX, typeMonitor, goldenLayer,
				goldenScratch, "-run-with"} {
				require.NotContains(t, all, gone)
			}
		})
	}
}

func TestEmulatedTakesTDsOnly(t *testing.T) {
	f := newestFeatures()
	for name, doc := range map[string]hypervisor.Document{
		"plain": goldenDocument(), "sample": confidentialDocument(), "snp": snpDocument(), "s390x": s390xDocument(), "se": seDocument(),
	} {
		_, err := newEmulatedLine(doc, f)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	broken := tdxDocument()
	broken.Boot.Firmware, broken.CPU.Count = "", 0
	_, _, err := New(Config{}).ACPITables(context.Background(), broken)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "boot.firmware")
	require.ErrorContains(t, err, "cpu.count")

	f.Types = []string{"virtio-scsi-pci", "scsi-hd", "memory-backend-memfd", "kvm-accel", "tcg-accel"}
	_, err = newEmulatedLine(tdxDocument(), f)
	var missing *Missing
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"virtio-net-pci"}, missing.What, "neither TDX nor a vsock device is needed")
}

// pciDevice is what firmware and ACPI see of a device before it has addresses.
type pciDevice struct {
	Slot    int `json:"slot"`
	Regions []struct {
		Bar      int    `json:"bar"`
		Type     string `json:"type"`
		Size     int64  `json:"size"`
		Prefetch bool   `json:"prefetch"`
		Wide     bool   `json:"mem_type_64"`
	} `json:"regions"`
	Pin int `json:"irq_pin"`
}

func pciDevices(t *testing.T, c *qmp.Client) []pciDevice {
	t.Helper()
	var buses []struct {
		Devices []pciDevice `json:"devices"`
	}
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Timeout)
	defer cancel()
	require.NoError(t, c.Execute(ctx, "query-pci", nil, &buses))
	require.NotEmpty(t, buses)
	return buses[0].Devices
}

// The stand-in asks the firmware for the same addresses as the vsock device, in one QEMU with the launched machine, in
// another with the emulated one.
func TestEmulatedDevicesLookTheSame(t *testing.T) {
	d := testDriver(t)
	launched := guestDocument(t, d, "idle")
	launched.SharedDirectories = 0
	launched.Confidential = &hypervisor.Confidential{Platform: abi.Sample}
	v := startGuest(t, d, launched)
	want := pciDevices(t, v.qmp)

	doc := launched
	doc.Boot.Firmware = filepath.Join(t.TempDir(), "firmware")
	require.NoError(t, os.WriteFile(doc.Boot.Firmware, make([]byte, 64<<10), 0o600))
	doc.Accelerator, doc.CPU.Model = hypervisor.AccelKVM, "host"
	doc.Confidential = tdxDocument().Confidential
	line, err := newEmulatedLine(doc, features(t, d))
	require.NoError(t, err)
	args := line.args
	ours, theirs, err := socketPair("qmp")
	require.NoError(t, err)
	defer ours.Close()
	p, err := supervise.Start(supervise.Command{
		Name: "QEMU",
		Path: probed(t, d).path, Args: append(args, "-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", supervise.FirstInheritedFD), "-mon",
			"chardev=qmp,mode=control"),
		Files: []*os.File{theirs}, Stdout: os.Stderr, Stderr: os.Stderr,
	})
	require.NoError(t, err)
	theirs.Close()
	defer func() {
		_ = p.Kill()
		<-p.Done()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Timeout)
	defer cancel()
	client, err := qmp.New(ctx, ours, nil)
	require.NoError(t, err)
	defer func() {
		client.Close()
		<-client.Done()
	}()
	got := pciDevices(t, client)
	require.Equal(t, want, got)
	i := slices.IndexFunc(got, func(d pciDevice) bool { return d.Slot == slotVsock })
	require.NotEqual(t, -1, i, "the slot is taken")
	require.NotEmpty(t, got[i].Regions)
}
