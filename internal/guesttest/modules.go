// SPDX-License-Identifier: Apache-2.0

package guesttest

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

// Modules returns what puts modules of a kernel into an initrd: /modules/NN-NAME.ko in the order given. dir is like
// lib/modules/<release>, with modules compressed by xz.
func Modules(t testing.TB, dir string, names ...string) []cpio.Record {
	t.Helper()
	records := []cpio.Record{cpio.Directory("modules", 0o755)}
	for i, name := range names {
		records = append(records, cpio.StaticFile(fmt.Sprintf("modules/%02d-%s.ko", i, name), string(module(t, dir, name)), 0o644))
	}
	return records
}

func module(t testing.TB, dir, name string) []byte {
	t.Helper()
	var found string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if filepath.Base(path) == name+".ko.xz" {
			found = path
		}
		return err
	})
	require.NoError(t, err)
	require.NotEmpty(t, found, "module %s in %s", name, dir)
	f, err := os.Open(found)
	require.NoError(t, err)
	defer f.Close()
	r, err := xz.NewReader(f)
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	return b
}
