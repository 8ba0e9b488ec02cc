// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestOnlineCPUs(t *testing.T) {
	root := t.TempDir()
	states := map[string]string{"cpu0": "", "cpu1": "1\n", "cpu2": "0\n", "cpu3": "0\n", "cpufreq": "0\n", "cpuidle": "0\n"}
	for name, state := range states {
		require.NoError(t, os.Mkdir(filepath.Join(root, name), 0o755))
		if state != "" {
			require.NoError(t, os.WriteFile(filepath.Join(root, name, "online"), []byte(state), 0o600))
		}
	}
	state := func(name string) string {
		b, err := os.ReadFile(filepath.Join(root, name, "online"))
		require.NoError(t, err)
		return string(b)
	}
	n, err := onlineCPUs(root, 1)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	n, err = onlineCPUs(root, 3)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.Equal(t, "1", state("cpu2"))
	require.Equal(t, "0\n", state("cpu3"))
	n, err = onlineCPUs(root, 9)
	require.NoError(t, err)
	require.Equal(t, 4, n, "more are awaited")
	require.Equal(t, "0\n", state("cpuidle"))
}
