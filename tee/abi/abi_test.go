// SPDX-License-Identifier: Apache-2.0

package abi

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestPlatforms(t *testing.T) {
	for name, want := range map[Platform]struct {
		confidential, protected bool
		arch, says              string
	}{
		None:   {false, false, "", "can read"},
		Sample: {true, false, "", "NO PROTECTION"},
		SNP:    {true, true, "amd64", "AMD"},
		TDX:    {true, true, "amd64", "Intel"},
		SE:     {true, true, "s390x", "IBM"},
		"":     {false, false, "", "unknown"},
		"sev":  {true, false, "", "unknown"},
	} {
		assert.Equal(t, want.confidential, name.Confidential(), name)
		assert.Equal(t, want.protected, name.Protected(), name)
		assert.Equal(t, want.arch, name.Architecture(), name)
		assert.Contains(t, name.Describe(), want.says, name)
		parsed, known := ParsePlatform(string(name))
		assert.Equal(t, name != "" && name != "sev", known, name)
		if known {
			assert.Equal(t, name, parsed)
		}
	}
	assert.Equal(t, "none, sample, snp, tdx, se", KnownPlatforms())
	assert.Len(t, Platforms(), 5)
}
