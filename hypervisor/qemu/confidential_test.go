// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

// A property that the binary does not have is named, and never left out.
func TestMissingTEEProperties(t *testing.T) {
	full := goldenCases()["snp-full"].doc
	var missing *Missing

	f := debianFeatures()
	f.Objects[typeSNP] = slices.DeleteFunc(f.Objects[typeSNP], func(p string) bool { return p == "host-data" || p == "id-block" })
	_, err := newCommandLine(full, f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"sev-snp-guest.host-data", "sev-snp-guest.id-block"}, missing.What)
	_, err = newCommandLine(snpDocument(), f, nil)
	require.NoError(t, err, "a document that does not need them")

	_, err = newCommandLine(tdxDocument(), debianFeatures(), nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"tdx-guest"}, missing.What)

	f = s390xFeatures()
	f.Types = []string{"kvm-accel"}
	_, err = newCommandLine(seDocument(), f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"sclpconsole", "virtio-scsi-ccw", "scsi-hd", "vhost-vsock-ccw", "virtio-net-ccw", typeSE}, missing.What)

	// A QEMU of another architecture is no QEMU that lacks something.
	_, err = newCommandLine(s390xDocument(), debianFeatures(), nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "the VM is for s390x and this QEMU for amd64")
}

func TestBootFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	raw := func(limit uint64) []byte {
		b := make([]byte, s390HeaderEnd)
		copy(b[s390MagicOffset:], s390Magic)
		binary.BigEndian.PutUint64(b[s390CommandLineOffset:], limit)
		return b
	}
	elf, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	initrd, empty := file("initrd", []byte("x")), file("empty", nil)
	for name, tc := range map[string]struct {
		boot hypervisor.Boot
		says string
	}{
		"old kernel": {hypervisor.Boot{Kernel: file("old", raw(0)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 895)}},
			""},
		"old kernel, too long": {hypervisor.Boot{Kernel: file("old2", raw(0)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 896)}},
			"896 bytes, the kernel takes 895"},
		"kernel": {hypervisor.Boot{Kernel: file("new", raw(4096)), Initrd: initrd,
			Parameters: []string{strings.Repeat("x", 4095)}}, ""},
		"kernel, too long": {hypervisor.Boot{Kernel: file("new2", raw(4096)), Initrd: initrd,
			Parameters: []string{strings.Repeat("x", 4096)}}, "the kernel takes 4095"},
		"kernel, damaged":         {hypervisor.Boot{Kernel: file("damaged", raw(1<<40)), Initrd: initrd}, "damaged"},
		"kernel of another kind":  {hypervisor.Boot{Kernel: file("elf", elf), Initrd: initrd}, "no raw s390x kernel"},
		"kernel, short":           {hypervisor.Boot{Kernel: file("short", raw(0)[:100]), Initrd: initrd}, "no raw s390x kernel"},
		"kernel, empty":           {hypervisor.Boot{Kernel: empty, Initrd: initrd}, "no raw s390x kernel"},
		"kernel is a directory":   {hypervisor.Boot{Kernel: dir, Initrd: initrd}, "no regular file"},
		"sealed":                  {hypervisor.Boot{Kernel: initrd, Sealed: true}, ""},
		"sealed, empty":           {hypervisor.Boot{Kernel: empty, Sealed: true}, "boot.kernel: " + empty},
		"sealed, missing":         {hypervisor.Boot{Kernel: dir + "/none", Sealed: true}, "no such file"},
		"initrd, empty, and both": {hypervisor.Boot{Kernel: file("k", raw(0)), Initrd: empty, Firmware: empty}, "boot.firmware"},
	} {
		t.Run(name, func(t *testing.T) {
			var f hypervisor.Faults
			bootFiles(&f, hypervisor.Document{Architecture: hypervisor.ArchS390X, Boot: tc.boot})
			if tc.says == "" {
				require.NoError(t, f.Err())
			} else {
				require.ErrorContains(t, f.Err(), tc.says)
			}
		})
	}
}

// With firmware the kernel is the file that the firmware starts and measures, not the ELF file out of it.
func TestFirmwareNeedsBzImage(t *testing.T) {
	kernel := vmtest.Kernel(t, hypervisor.ArchAMD64)
	var f hypervisor.Faults
	bootFiles(&f, hypervisor.Document{Boot: hypervisor.Boot{Kernel: kernel, Initrd: kernel}})
	require.NoError(t, f.Err())
	bootFiles(&f, hypervisor.Document{Boot: hypervisor.Boot{Kernel: kernel, Initrd: kernel, Firmware: kernel}})
	require.ErrorContains(t, f.Err(), "give it the bzImage")
}
