// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// A list of faults is of one kind, keeps the kinds of what is in it, and repeats the word for its own nowhere.
func TestFaultsAreOfAKind(t *testing.T) {
	require.NoError(t, Faults(nil).Err())
	require.NoError(t, Faults{}.Of("VM"))
	var f Faults
	f.Add("%d CPUs", 0)
	f.Add("no such image: %w", os.ErrNotExist)
	f = append(f, fmt.Errorf("the image is damaged: %w", errdefs.ErrInvalidArgument))
	err := fmt.Errorf("launch: %w", f.Of("VM"))
	require.EqualError(t, err, "launch: VM: 0 CPUs\nno such image: file does not exist\nthe image is damaged")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.False(t, errors.Is(err, errdefs.ErrNotFound))
	require.ErrorContains(t, f.Err(), "the VM's description is not valid: 0 CPUs")
}
