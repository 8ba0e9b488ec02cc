// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestReasons(t *testing.T) {
	require.NoError(t, Of(nil))
	err := Of([]string{"a device", "a socket"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.EqualError(t, err, "not in a VM, for 2 reasons: (1) a device (2) a socket")
	require.EqualError(t, Of([]string{"a device"}), "not in a VM: a device")

	reasons, other := Reasons(fmt.Errorf("container c: %w", err))
	require.NoError(t, other)
	require.Equal(t, []string{"a device", "a socket"}, reasons)

	fault := errors.New("no process")
	reasons, other = Reasons(fault)
	require.Equal(t, fault, other)
	require.Empty(t, reasons)
	reasons, other = Reasons(nil)
	require.NoError(t, other)
	require.Empty(t, reasons)
}
