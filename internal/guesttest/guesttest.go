// SPDX-License-Identifier: Apache-2.0

package guesttest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
)

// Initrd builds the Go program in directory pkg for Linux on arch (Go's name) and returns the path of an initrd that has it as
// /init beside /dev/console and what else is wanted. It lies in a directory of the test.
func Initrd(t testing.TB, arch, pkg string, more ...cpio.Record) string {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	init, err := os.ReadFile(binary)
	require.NoError(t, err)

	var archive bytes.Buffer
	w := cpio.Newc.Writer(&archive)
	for _, r := range append([]cpio.Record{
		cpio.Directory("dev", 0o755), cpio.CharDev("dev/console", 0o600, 5, 1), cpio.StaticFile("init", string(init), 0o755),
	}, more...) {
		require.NoError(t, w.WriteRecord(r))
	}
	require.NoError(t, cpio.WriteTrailer(w))
	path := filepath.Join(dir, "initrd.img")
	require.NoError(t, os.WriteFile(path, archive.Bytes(), 0o600))
	return path
}
