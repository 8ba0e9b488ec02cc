// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"context"
	"errors"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/none"
	"github.com/cloister-project/cloister/tee/sample"
	"github.com/cloister-project/cloister/tee/se"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/tee/tdx"
)

// Options of a platform that no configuration has, for tools.
type Options struct {
	// ACPI is a directory with the ACPI blobs of the VM that is measured (tdx.Config.ACPI); empty: none are known.
	ACPI string
	// Tables makes these blobs (tdx.Config.Tables); nil: ACPI counts.
	Tables func(ctx context.Context, doc hypervisor.Document) (tables hypervisor.ACPITables, how string, err error)
}

// New returns the platform that the configuration names, with its settings checked. The error is of type configs.Faults and
// has everything that is wrong.
func New(cfg *configs.Config, o Options) (tee.Platform, error) {
	p, err := choose(cfg, o)
	var faults tee.Faults
	if err != nil && !errors.As(err, &faults) {
		return nil, err
	}
	if name := tee.Name(cfg.TEE.Platform); name.Confidential() {
		faults = append(faults, confidentialFaults(cfg, name)...)
	}
	if len(faults) > 0 {
		var located configs.Faults
		for _, f := range faults {
			located = append(located, cfg.Fault(f.Key, f.Reason, f.Fix))
		}
		return nil, located
	}
	return p, nil
}

func choose(cfg *configs.Config, o Options) (tee.Platform, error) {
	t, h := cfg.TEE, cfg.Hypervisor
	switch name := tee.Name(t.Platform); name {
	case tee.None, "":
		return none.New(), nil
	case tee.Sample:
		// On s390x it boots a sealed image if there is one.
		c := sample.Config{}
		if cfg.Architecture() == configs.ArchS390X {
			c.SealedImage = t.SE.Image
		}
		return sample.New(c), nil
	case tee.SNP:
		return snp.New(snp.Config{
			IGVM:     h.Kind == configs.KindCloudHypervisor,
			Firmware: t.SNP.Firmware, Descriptors: t.FirmwareDescriptors, Digests: t.SNP.FirmwareDigests, AllowDebug: t.AllowDebug,
			Policy: t.SNP.Policy, GuestFeatures: t.SNP.GuestFeatures, CPUModel: h.CPUModel, IDKey: t.SNP.IDKey, AuthorKey: t.SNP.AuthorKey,
			FamilyID: t.SNP.FamilyID, ImageID: t.SNP.ImageID, GuestSVN: t.SNP.GuestSVN,
		})
	case tee.TDX:
		return tdx.New(tdx.Config{
			Firmware: t.TDX.Firmware, Descriptors: t.FirmwareDescriptors, Digests: t.TDX.FirmwareDigests, AllowDebug: t.AllowDebug,
			Attributes: t.TDX.Attributes, CPUModel: h.CPUModel, QuoteSocket: t.TDX.QuoteSocket,
			MROwner: t.TDX.MROwner, MROwnerConfig: t.TDX.MROwnerConfig,
			ACPI: o.ACPI, Tables: o.Tables,
		})
	case tee.SE:
		c := se.Config{Image: t.SE.Image, CPUModel: h.CPUModel, AllowDebug: t.AllowDebug}
		if h.Vsock != configs.VsockAuto {
			c.Vsock = hypervisor.VsockKind(h.Vsock)
		}
		return se.New(c)
	default:
		return nil, configs.Faults{cfg.Fault("tee.platform", "\""+t.Platform+"\" is not known", "give one of "+abi.KnownPlatforms())}
	}
}
