// SPDX-License-Identifier: Apache-2.0

package none

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

func TestProbeClaimsNoProtection(t *testing.T) {
	findings := New().Probe(context.Background(), tee.Host{})
	require.NoError(t, tee.Supported(tee.None, findings))
	require.Len(t, findings, 1)
	assert.Equal(t, tee.Note, findings[0].Result)
	assert.Contains(t, findings[0].Detail, "the host can read")
}

func TestPrepareChangesNothing(t *testing.T) {
	doc := hypervisor.Document{ID: "p", SharedDirectories: 2, Boot: hypervisor.Boot{Kernel: "/k", Parameters: []string{"quiet"}}}
	before := doc
	require.NoError(t, New().Prepare(context.Background(), &doc, tee.Inputs{}))
	assert.Equal(t, before, doc)
	values, err := New().Measure(context.Background(), doc)
	require.NoError(t, err)
	assert.Equal(t, tee.None, values.Platform)
	assert.Empty(t, values.Values)
}

func TestPrepareRefuses(t *testing.T) {
	doc := hypervisor.Document{
		Confidential: &hypervisor.Confidential{Platform: "snp"},
		Boot:         hypervisor.Boot{Parameters: []string{"cloister.tee=snp", "quiet", "cloister.initdata=00"}},
	}
	err := New().Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: []byte{1}})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	for _, want := range []string{"nothing binds it", `platform "snp" already`, "cloister.tee=snp", "cloister.initdata=00"} {
		assert.ErrorContains(t, err, want)
	}
}
