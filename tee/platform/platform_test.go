// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"slices"
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

func TestEveryNameGivesItsPlatform(t *testing.T) {
	for _, name := range tee.Names() {
		c := config(t)
		c.Hypervisor.Arch = name.Architecture()
		c.TEE.Platform = string(name)
		p, err := New(c, Options{})
		require.NoError(t, err, name)
		assert.Equal(t, name, p.Name())
	}

	c := config(t)
	c.TEE.Platform = ""
	p, err := New(c, Options{})
	require.NoError(t, err)
	assert.Equal(t, tee.None, p.Name())
}

func TestUnknownNames(t *testing.T) {
	for _, name := range []string{"sev", "SNP", "snp ", "none,snp"} {
		c := config(t)
		c.TEE.Platform = name
		p, err := New(c, Options{})
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		require.Nil(t, p)
		assert.ErrorContains(t, err, "give one of none, sample, snp, tdx, se")
	}
}

// Each platform gets its settings: a bad one comes back as its fault, and as a nil that compares as nil.
func TestSettingsReachThePlatform(t *testing.T) {
	for _, tc := range []struct {
		name   tee.Name
		change func(*configs.TEE)
		key    string
		want   string
	}{
		{tee.SNP, func(c *configs.TEE) { c.SNP.Policy = 1 << 16 }, "tee.snp.policy", "bit 17"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.GuestFeatures = 0 }, "tee.snp.guest_features", "bit 0"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.IDKey = "key.pem" }, "tee.snp.id_key", "key.pem"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.AuthorKey = "key.pem" }, "tee.snp.author_key", "key.pem"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.FamilyID = "zz" }, "tee.snp.family_id", "zz"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.ImageID = "zz" }, "tee.snp.image_id", "zz"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.GuestSVN = -1 }, "tee.snp.guest_svn", "-1"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.Firmware = "OVMF.fd" }, "tee.snp.firmware", "OVMF.fd"},
		{tee.SNP, func(c *configs.TEE) { c.FirmwareDescriptors = []string{"here"} }, "tee.firmware_descriptors", "here"},
		{tee.SNP, func(c *configs.TEE) { c.SNP.FirmwareDigests = []string{"beef"} }, "tee.snp.firmware_digests", "beef"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.Attributes = 0 }, "tee.tdx.attributes", "SEPT_VE_DISABLE"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.QuoteSocket = "tcp:x" }, "tee.tdx.quote_socket", "tcp:x"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.MROwner = "00" }, "tee.tdx.mrowner", "48 bytes"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.MROwnerConfig = "00" }, "tee.tdx.mrownerconfig", "48 bytes"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.Firmware = "OVMF.fd" }, "tee.tdx.firmware", "OVMF.fd"},
		{tee.TDX, func(c *configs.TEE) { c.TDX.FirmwareDigests = []string{"beef"} }, "tee.tdx.firmware_digests", "beef"},
		{tee.SE, func(c *configs.TEE) { c.SE.Image = "" }, "tee.se.image", "is empty"},
	} {
		t.Run(string(tc.name)+" "+tc.want, func(t *testing.T) {
			c := config(t)
			c.Hypervisor.Arch = tc.name.Architecture()
			c.TEE.Platform = string(tc.name)
			tc.change(&c.TEE)
			p, err := New(c, Options{})
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			require.Nil(t, p)
			var faults configs.Faults
			require.ErrorAs(t, err, &faults)
			i := slices.IndexFunc(faults, func(f configs.Fault) bool { return f.Key == tc.key && strings.Contains(f.Reason, tc.want) })
			require.NotEqual(t, -1, i, "%v", err)
			assert.NotEmpty(t, faults[i].Fix)
		})
	}
	c := config(t)
	c.TEE.Platform, c.Hypervisor.Arch = string(tee.SNP), configs.ArchAMD64
	c.TEE.SNP.Policy |= 1 << 19
	_, err := New(c, Options{})
	require.ErrorContains(t, err, "bit 19")
	c.TEE.AllowDebug = true
	_, err = New(c, Options{})
	require.NoError(t, err)
}

func TestOptionsReachThePlatform(t *testing.T) {
	c := config(t)
	c.TEE.Platform, c.Hypervisor.Arch = string(tee.TDX), configs.ArchAMD64
	_, err := New(c, Options{ACPI: "blobs"})
	require.ErrorContains(t, err, "blobs")
	_, err = New(c, Options{ACPI: "/blobs"})
	require.NoError(t, err)
}
