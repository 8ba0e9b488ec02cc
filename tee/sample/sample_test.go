// SPDX-License-Identifier: Apache-2.0

package sample

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

func document(parameters ...string) *hypervisor.Document {
	return &hypervisor.Document{Boot: hypervisor.Boot{Kernel: "/vmlinuz", Initrd: "/initrd", Parameters: parameters}}
}

func TestProbeClaimsNoProtection(t *testing.T) {
	findings := New(Config{}).Probe(context.Background(), tee.Host{})
	require.NoError(t, tee.Supported(tee.Sample, findings))
	require.Len(t, findings, 1)
	assert.Equal(t, tee.Note, findings[0].Result)
	assert.Contains(t, findings[0].Detail, "NO PROTECTION")
	assert.False(t, tee.Sample.Protected())
}

func TestPrepareBindsInitdata(t *testing.T) {
	doc := document("quiet", "cloister.tee=sample")
	shared := doc.Boot.Parameters[:1:2]
	require.NoError(t, New(Config{}).Prepare(context.Background(), doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{0xab}, 32)}))
	assert.Equal(t, &hypervisor.Confidential{Platform: "sample"}, doc.Confidential)
	assert.Equal(t, []string{"quiet", "cloister.tee=sample", "cloister.initdata=" + strings.Repeat("ab", 32) + strings.Repeat("00", 32)},
		doc.Boot.Parameters)
	assert.Equal(t, []string{"quiet"}, shared)

	values, err := New(Config{}).Measure(context.Background(), *doc)
	require.NoError(t, err)
	assert.Empty(t, values.Values, "nothing is measured, so nothing may look like a measurement")
}

func TestPrepareWithoutInitdata(t *testing.T) {
	doc := document("cloister.tee=sample")
	require.NoError(t, New(Config{}).Prepare(context.Background(), doc, tee.Inputs{}))
	assert.Equal(t, []string{"cloister.tee=sample"}, doc.Boot.Parameters)
}

func TestPrepareAddsNothingToASealedImage(t *testing.T) {
	doc := &hypervisor.Document{Boot: hypervisor.Boot{Kernel: "/image", Sealed: true}}
	require.NoError(t, New(Config{}).Prepare(context.Background(), doc, tee.Inputs{InitdataDigest: []byte{1}}))
	assert.Equal(t, hypervisor.Boot{Kernel: "/image", Sealed: true}, doc.Boot)
	assert.Equal(t, tee.Sample, doc.Confidential.Platform)
}

func TestPrepareRefuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*hypervisor.Document)
		want   string
	}{
		{"shared directories", func(d *hypervisor.Document) { d.SharedDirectories = 2 }, "no shared directories"},
		{"another platform", func(d *hypervisor.Document) { d.Confidential = &hypervisor.Confidential{Platform: "tdx"} },
			`platform "tdx" already`},
		{"another platform's part", func(d *hypervisor.Document) {
			d.Confidential = &hypervisor.Confidential{Platform: "sample", SNP: &hypervisor.SNP{}}
		}, "already"},
		{"no kernel", func(d *hypervisor.Document) { d.Boot.Kernel = "" }, "boot.kernel is not given"},
		{"guest is not told", func(d *hypervisor.Document) { d.Boot.Parameters = nil }, "given 0 times"},
		{"guest is told twice", func(d *hypervisor.Document) { d.Boot.Parameters = append(d.Boot.Parameters, "cloister.tee=sample") },
			"given 2 times"},
		{"guest is told another", func(d *hypervisor.Document) { d.Boot.Parameters = []string{"cloister.tee=snp"} },
			"cloister.tee=snp names another"},
		{"foreign binding", func(d *hypervisor.Document) { d.Boot.Parameters = append(d.Boot.Parameters, "cloister.initdata=00") },
			"is the launch's to set"},
		{"parameters beside a sealed image", func(d *hypervisor.Document) { d.Boot.Sealed = true }, "sealed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			doc := document("cloister.tee=sample")
			tc.change(doc)
			err := New(Config{}).Prepare(context.Background(), doc, tee.Inputs{})
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			require.ErrorContains(t, err, tc.want)
		})
	}
	doc := document("quiet")
	doc.SharedDirectories = 1
	err := New(Config{}).Prepare(context.Background(), doc, tee.Inputs{})
	for _, want := range []string{"shared directories", "given 0 times"} {
		assert.ErrorContains(t, err, want, "all reasons at once")
	}
}
