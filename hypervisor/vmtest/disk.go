// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

// Disk makes an image in a directory, whose first bytes are its number. Every other one is read-only.
func Disk(t testing.TB, dir string, i int) hypervisor.Disk {
	t.Helper()
	d := hypervisor.Disk{
		ID:       fmt.Sprintf("layer-%d", i),
		Serial:   fmt.Sprintf("serial_%03d", i),
		Path:     filepath.Join(dir, fmt.Sprintf("image,%d", i)), // a comma must not matter
		ReadOnly: i%2 == 0,
	}
	image := make([]byte, 1<<20)
	copy(image, fmt.Sprintf("d%d", i))
	require.NoError(t, os.WriteFile(d.Path, image, 0o600))
	return d
}

// DisksLine is what the init of "devices" prints when the guest has these disks of Disk and no others.
func DisksLine(disks []hypervisor.Disk) string {
	var s []string
	for _, d := range disks {
		ro := "0"
		if d.ReadOnly {
			ro = "1"
		}
		s = append(s, d.Serial+"=d"+strings.TrimPrefix(d.ID, "layer-")+"/"+ro)
	}
	slices.Sort(s)
	return fmt.Sprintf("DISKS %d: %s.", len(s), strings.Join(s, ","))
}

// RequireClosed checks that the VMM does not have a file open, by whatever path.
func (v *VM) RequireClosed(t testing.TB, path string) {
	t.Helper()
	file, err := os.Stat(path)
	require.NoError(t, err)
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", v.PID()))
	require.NoError(t, err)
	require.NotEmpty(t, fds)
	for _, fd := range fds {
		if open, err := os.Stat(fd); err == nil { // else it is gone meanwhile
			require.False(t, os.SameFile(file, open), "the VMM has %s open", path)
		}
	}
}
