// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

// newNode makes the files that a configuration names, and returns the configuration's path. The VMM among them does not
// run.
func newNode(t testing.TB, more string) (config string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "dryrun") // short: state.dir is limited
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o755))
		return path
	}
	fw := firmwaretest.SNP().Bytes()
	kernel := make([]byte, 4096)
	copy(kernel[0x202:], "HdrS") // Linux, Documentation/arch/x86/boot.rst
	return write("cloister.toml", fmt.Sprintf(`
[hypervisor]
arch = "amd64"
path = %q
kernel = %q
initrd = %q
[state]
dir = %q
[rootfs]
cache_dir = %q
[tee]
snp = {firmware = %q, firmware_digests = ["%x"]}
%s`, write("qemu", "#!/bin/sh\necho out of order >&2\nexit 1\n"), write("vmlinuz", string(kernel)), write("initrd", "initrd"),
		filepath.Join(dir, "state"), filepath.Join(dir, "cache"), write("OVMF.fd", string(fw)), sha256.Sum256(fw), more))
}

func load(t testing.TB, config, platform string) *configs.Config {
	t.Helper()
	cfg, err := configs.Load(config)
	require.NoError(t, err)
	cfg, err = cfg.WithPlatform(platform)
	require.NoError(t, err)
	return cfg
}

func parse(t testing.TB, text string) *manifest.Pod {
	t.Helper()
	p, err := manifest.Parse([]byte(text))
	require.NoError(t, err)
	return p
}
