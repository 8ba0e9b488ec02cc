// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestCheck has a machine that was set up for the main job, and asks what other handlers lack.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	a := Artifacts{
		Conformance: dir, Bin: dir, Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd.img"),
		QEMU: filepath.Join(dir, "qemu"), Busybox: filepath.Join(dir, "busybox"),
	}
	for _, name := range append(Peers(HandlerCloister), "containerd-shim-cloister-v2", "vmlinuz", "initrd.img", "qemu", "busybox") {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	for _, c := range []struct {
		name     string
		handlers []string
		lacks    []string
	}{
		{"the main job", []string{HandlerCloister, HandlerClassic}, nil},
		{"EROFS", []string{HandlerCloister, HandlerErofs}, []string{"mkfs.erofs: file does not exist: run `make setup`"}},
		{"runc", []string{HandlerRunc}, []string{"/runc: no such file", "/containerd-shim-runc-v2: no such file", "run `make peers`"}},
		{"all", nil, []string{"mkfs.erofs", "/runc", "/containerd-shim-runc-v2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := a.Check(c.handlers...)
			if len(c.lacks) == 0 {
				require.NoError(t, err)
			}
			for _, want := range c.lacks {
				assert.ErrorContains(t, err, want)
			}
		})
	}
	require.ErrorContains(t, a.CheckS390X(), "QEMU for s390x: file does not exist: run `make setup`")
	require.Error(t, Artifacts{Conformance: dir, Busybox: a.Busybox}.Check(HandlerCloister), "no QEMU")
}
