// SPDX-License-Identifier: Apache-2.0

// Package platform picks a platform of package tee by the name in the configuration. There is no choice by what the host
// offers: a node that lacks what is named fails the pod.
package platform

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/none"
	"github.com/cloister-project/cloister/tee/sample"
	"github.com/cloister-project/cloister/tee/se"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/tee/tdx"
)

// Options of a platform that no configuration has, for tools.
type Options struct {
	// ACPI is a folder with the ACPI blobs of the VM that is measured (tdx.Config.ACPI); empty: none are known.
	ACPI string
	// Tables makes these blobs (tdx.Config.Tables); nil: ACPI counts.
	Tables func(ctx context.Context, doc hypervisor.Document) (blobs *tdx.ACPI, how string, err error)
}

// New gives the platform that the configuration names, with its settings checked: errdefs.ErrInvalidArgument if they are
// bad or the name is not known.
func New(cfg *configs.Config) (tee.Platform, error) { return NewWith(cfg, Options{}) }

// NewWith is New with options.
func NewWith(cfg *configs.Config, o Options) (tee.Platform, error) {
	t := cfg.TEE
	switch name := tee.Name(t.Platform); name {
	case tee.None, "":
		return none.New(), nil
	case tee.Sample:
		return sample.New(), nil
	case tee.SNP:
		return made(snp.New(snp.Config{
			Firmware: t.SNP.Firmware, Descriptors: t.FirmwareDescriptors, Digests: t.SNP.FirmwareDigests, AllowDebug: t.AllowDebug,
			Policy: t.SNP.Policy, GuestFeatures: t.SNP.GuestFeatures, IDKey: t.SNP.IDKey, AuthorKey: t.SNP.AuthorKey,
			FamilyID: t.SNP.FamilyID, ImageID: t.SNP.ImageID, GuestSVN: t.SNP.GuestSVN,
		}))
	case tee.TDX:
		return made(tdx.New(tdx.Config{
			Firmware: t.TDX.Firmware, Descriptors: t.FirmwareDescriptors, Digests: t.TDX.FirmwareDigests, AllowDebug: t.AllowDebug,
			Attributes: t.TDX.Attributes, QuoteSocket: t.TDX.QuoteSocket, MROwner: t.TDX.MROwner, MROwnerConfig: t.TDX.MROwnerConfig,
			ACPI: o.ACPI, Tables: o.Tables,
		}))
	case tee.SE:
		return made(se.New(se.Config{Image: t.SE.Image, AllowDebug: t.AllowDebug}))
	default:
		return nil, fmt.Errorf("tee.platform = %q is not known; known are %s: %w", name, Known(), errdefs.ErrInvalidArgument)
	}
}

// made keeps a nil of a platform's own type out of the interface.
func made[P tee.Platform](p P, err error) (tee.Platform, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Known lists the names for people.
func Known() string {
	var names []string
	for _, n := range tee.Names() {
		names = append(names, string(n))
	}
	return strings.Join(names, ", ")
}
