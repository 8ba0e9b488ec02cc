// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
)

func config(t *testing.T) *configs.Config {
	t.Helper()
	t.Setenv(configs.PathVariable, "")
	c, err := configs.Defaults()
	require.NoError(t, err)
	c.TEE.SE.Image = "/se.img"
	return c
}

// Configuration and package tee must know the same names.
func TestEveryNameGivesItsPlatform(t *testing.T) {
	var names []string
	for _, name := range tee.Names() {
		names = append(names, string(name))
		c := config(t)
		c.TEE.Platform = string(name)
		p, err := New(c)
		require.NoError(t, err, name)
		assert.Equal(t, name, p.Name())
	}
	assert.Equal(t, configs.Platforms(), names)

	c := config(t)
	c.TEE.Platform = ""
	p, err := New(c)
	require.NoError(t, err)
	assert.Equal(t, tee.None, p.Name())
}

func TestUnknownNames(t *testing.T) {
	for _, name := range []string{"sev", "SNP", "snp ", "none,snp"} {
		c := config(t)
		c.TEE.Platform = name
		p, err := New(c)
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		require.Nil(t, p)
		assert.ErrorContains(t, err, "known are none, sample, snp, tdx, se")
	}
}

// Each platform gets its settings: a bad one comes back as its fault, and as a nil that compares as nil.
func TestSettingsReachThePlatform(t *testing.T) {
	for _, tc := range []struct {
		name   tee.Name
		change func(*configs.TEE)
		want   string
	}{
		{tee.SNP, func(c *configs.TEE) { c.SNP.Policy = 1 << 16 }, "policy"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.GuestFeatures = 0 }, "guest_features"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.IDKey = "key.pem" }, "id_key"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.AuthorKey = "key.pem" }, "author_key"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.FamilyID = "zz" }, "family_id"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.ImageID = "zz" }, "image_id"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.GuestSVN = -1 }, "guest_svn"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.Firmware = "OVMF.fd" }, "OVMF.fd"},
		{tee.SNP, func(c *configs.TEE) { c.FirmwareDescriptors = []string{"here"} }, "here"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.FirmwareDigests = []string{"beef"} }, "beef"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.Attributes = 0 }, "SEPT_VE_DISABLE"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.QuoteSocket = "tcp:x" }, "tcp:x"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.MROwner = "00" }, "MROWNER"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.MROwnerConfig = "00" }, "MROWNERCONFIG"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.Firmware = "OVMF.fd" }, "OVMF.fd"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.FirmwareDigests = []string{"beef"} }, "beef"},
		{tee.SE, func(c *configs.TEE) { c.SE.Image = "" }, "tee.se.image"},
	} {
		t.Run(string(tc.name)+" "+tc.want, func(t *testing.T) {
			c := config(t)
			c.TEE.Platform = string(tc.name)
			tc.change(&c.TEE)
			p, err := New(c)
			require.ErrorContains(t, err, tc.want)
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			require.Nil(t, p)
		})
	}
	c := config(t)
	c.TEE.Platform = string(tee.SNP)
	c.TEE.SNP.Policy |= 1 << 19
	_, err := New(c)
	require.ErrorContains(t, err, "bit 19")
	c.TEE.AllowDebug = true
	_, err = New(c)
	require.NoError(t, err)
}

func TestOptionsReachThePlatform(t *testing.T) {
	c := config(t)
	c.TEE.Platform = string(tee.TDX)
	_, err := NewWith(c, Options{ACPI: "blobs"})
	require.ErrorContains(t, err, "blobs")
	_, err = NewWith(c, Options{ACPI: "/blobs"})
	require.NoError(t, err)
}

func TestKnown(t *testing.T) {
	assert.Len(t, strings.Split(Known(), ", "), len(tee.Names()))
}
