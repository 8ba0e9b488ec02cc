// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSealedParameters has the command line as it is sealed: a change of it changes every image that is built from then on.
func TestSealedParameters(t *testing.T) {
	params, err := SealedParameters()
	require.NoError(t, err)
	require.Equal(t, "console=ttysclp0 quiet panic=-1 cgroup_no_v1=all random.trust_cpu=on rcupdate.rcu_expedited=1 "+
		"random.trust_bootloader=off swiotlb=32768", strings.Join(params, " "))
}
