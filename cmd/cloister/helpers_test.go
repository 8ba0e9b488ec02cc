// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// cloister runs the tool in this process.
func cloister(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	t.Setenv(configs.PathVariable, "")
	var out, errs bytes.Buffer
	status = run(context.Background(), args, &out, &errs)
	return status, out.String(), errs.String()
}

// node is a directory with all that a configuration names; the files have fixed contents and no QEMU is among them.
type node struct{ dir, config string }

func newNode(t *testing.T, more string) *node {
	t.Helper()
	return nodeWithFirmware(t, firmwaretest.SNP().Bytes(), more)
}

// nodeWithFirmware is newNode with another firmware, which is accepted for SEV-SNP and TDX.
func nodeWithFirmware(t *testing.T, fw []byte, more string) *node {
	t.Helper()
	n := &node{dir: t.TempDir()}
	n.write(t, "vmlinuz", bzImage("kernel"))
	n.write(t, "initrd.img", "initrd")
	n.write(t, "OVMF.fd", string(fw))
	n.write(t, "qemu", "#!/bin/sh\nexit 1\n")
	require.NoError(t, os.Chmod(n.path("qemu"), 0o755))
	n.config = n.write(t, "cloister.toml", fmt.Sprintf(`
[hypervisor]
arch = "amd64"
path = %[1]q
kernel = %[2]q
initrd = %[3]q
[tee]
snp = {firmware = %[4]q, firmware_digests = ["%[5]x"]}
tdx = {firmware = %[4]q, firmware_digests = ["%[5]x"]}
%[6]s`, n.path("qemu"), n.path("vmlinuz"), n.path("initrd.img"), n.path("OVMF.fd"), sha256.Sum256(fw), more))
	return n
}

// bzImage is a file that looks like a kernel with the set-up header of the x86 boot protocol.
func bzImage(content string) string {
	b := make([]byte, 4096)
	copy(b[0x1fe:], "\x55\xaa")
	copy(b[0x202:], "HdrS\x0f\x02")
	return string(b) + content
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) write(t *testing.T, name, content string) string {
	t.Helper()
	require.NoError(t, os.WriteFile(n.path(name), []byte(content), 0o644))
	return n.path(name)
}

// load returns the node's configuration for a platform.
func (n *node) load(t *testing.T, platform string) *configs.Config {
	t.Helper()
	cfg, err := (&nodeFlags{config: n.config, tee: platform}).load()
	require.NoError(t, err)
	return cfg
}

// golden compares with a file of testdata, in which the node's directory is /node.
func (n *node) golden(t *testing.T, name, got string) {
	t.Helper()
	got = strings.ReplaceAll(got, n.dir, "/node")
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), got, "run with -update and read the difference")
}
