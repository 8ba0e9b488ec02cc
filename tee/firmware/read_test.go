// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestReadKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(path, []byte("secret text"), 0o600))
	for mode, accepted := range map[os.FileMode]bool{0o600: true, 0o400: true, 0o640: true, 0o604: false, 0o602: false, 0o601: false,
		0o644: false} {
		require.NoError(t, os.Chmod(path, mode))
		content, err := ReadKeyFile(path, 11)
		if accepted {
			require.NoError(t, err)
			require.Equal(t, "secret text", string(content))
			continue
		}
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, fmt.Sprintf("open to all users (mode %04o); chmod 600 it", mode))
		require.NotContains(t, err.Error(), "secret text")
		require.Nil(t, content)
	}
	require.NoError(t, os.Chmod(path, 0o600))
	_, err := ReadKeyFile(path, 10)
	require.ErrorContains(t, err, "11 bytes, more than the 10")
	_, err = ReadKeyFile(path+"-none", 10)
	require.ErrorIs(t, err, os.ErrNotExist)

	// What was looked at is what is read, whatever has its name meanwhile.
	other := filepath.Join(t.TempDir(), "other")
	require.NoError(t, os.WriteFile(other, []byte("other words"), 0o600))
	var read bytes.Buffer
	_, err = digestFile(path, 11, &read, func(os.FileMode) error { return os.Rename(other, path) })
	require.NoError(t, err)
	require.Equal(t, "secret text", read.String())
}
