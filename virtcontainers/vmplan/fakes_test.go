// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

// testPlan is a plan with what every configuration has.
func testPlan(t *testing.T, pod Pod) *Plan {
	t.Helper()
	cfg := *pod.Config
	if cfg.Hypervisor.Kind == "" {
		cfg.Hypervisor.Kind = configs.KindQEMU
	}
	if cfg.TEE.SNP.GuestFeatures == 0 {
		cfg.TEE.SNP.Policy, cfg.TEE.SNP.GuestFeatures = 0x30000, 1
	}
	if cfg.TEE.TDX.Attributes == 0 {
		cfg.TEE.TDX.Attributes = 1 << 28
	}
	pod.Config = &cfg
	p, err := New(pod)
	require.NoError(t, err)
	return p
}

// fakePlatform has a name, and does what a test says.
type fakePlatform struct {
	tee.Platform
	name     tee.Name
	findings []tee.Finding
	prepare  func(*hypervisor.Document, tee.Inputs) error
	measure  func() (*tee.ReferenceValues, error)
}

func (f fakePlatform) Prepare(_ context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	return f.prepare(doc, in)
}

func (f fakePlatform) Name() tee.Name { return f.name }

func (f fakePlatform) Probe(context.Context, tee.Host) []tee.Finding { return f.findings }

func (f fakePlatform) Measure(context.Context, hypervisor.Document) (*tee.ReferenceValues, error) {
	return f.measure()
}

// fakeDriver is there and can do nothing. Its guests have the vsock devices that a test says.
type fakeDriver struct {
	hypervisor.Driver
	vsock []hypervisor.VsockKind
}

func (fakeDriver) Kind() string { return "fake" }

func (d fakeDriver) VsockKinds() []hypervisor.VsockKind { return d.vsock }

func (fakeDriver) Capabilities(context.Context) (hypervisor.Capabilities, error) {
	return hypervisor.Capabilities{}, nil
}

func (fakeDriver) Accelerator(context.Context, string) (hypervisor.Accelerator, error) {
	return hypervisor.AccelKVM, nil
}
