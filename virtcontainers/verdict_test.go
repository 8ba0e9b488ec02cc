// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee/platform"
)

// What CheckPod says is what NewPod says, and it makes nothing.
func TestCheckPod(t *testing.T) {
	dir := t.TempDir()
	cfg := PodConfig{ID: "p", Network: NetworkHost, Config: &configs.Config{
		Hypervisor: configs.Hypervisor{Kind: configs.KindQEMU}, Rootfs: configs.Rootfs{CacheDir: dir + "/cache"},
	}}
	_, err := CheckPod(cfg, platform.Options{})
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	_, same := NewPod(t.Context(), cfg)
	require.EqualError(t, same, err.Error())
	cfg.Network = NetworkNew
	plan, err := CheckPod(cfg, platform.Options{})
	require.NoError(t, err)
	require.NotNil(t, plan.Driver())
	require.NoDirExists(t, dir+"/cache")
}
