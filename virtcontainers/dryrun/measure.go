// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	vc "github.com/cloister-project/cloister/virtcontainers"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

// Measurement is what the hardware would report.
type Measurement struct {
	Platform    tee.Name `json:"platform"`
	Description string   `json:"description"`
	// Predicted is always true: the values are computed from files, no hardware reported them.
	Predicted       bool                  `json:"predicted"`
	ReferenceValues []tee.ReferenceValues `json:"reference_values"`
	// Emulated: a VMM was asked for what the firmware gets of it.
	Emulated bool `json:"-"`
	// AnyCPUs: the values do not depend on the number of CPUs, so that there is one set of them for all.
	AnyCPUs bool `json:"-"`
}

// Variants are what is measured for.
type Variants struct {
	// VCPUs are the numbers of virtual CPUs; none: the pod's.
	VCPUs []int
	// Models are the CPU models; none: the configuration's.
	Models []string
	// Tables says where the ACPI tables come from.
	Tables Tables
}

// MaxVariants bounds what one call computes.
const MaxVariants = 4096

// Measure predicts the values of a pod for each variant: all CPU counts of the first model, then of the next.
func Measure(ctx context.Context, cfg *configs.Config, p *manifest.Pod, v Variants) (*Measurement, error) {
	name := tee.Name(cfg.TEE.Platform)
	m := &Measurement{Platform: name, Description: name.Describe(), Predicted: true, Emulated: v.Tables.FromVMM}
	if !name.Protected() {
		return nil, fmt.Errorf("platform %s: no hardware measures it, so there is nothing to predict; choose snp, tdx or se", name.Describe())
	}
	applied, err := cfg.ApplyAnnotations(p.Metadata.Annotations)
	if err != nil {
		return nil, err
	}
	models, counts := v.Models, v.VCPUs
	if len(models) == 0 {
		models = []string{applied.Hypervisor.CPUModel}
	}
	if len(counts) == 0 {
		counts = []int{podsOwn}
	}
	if n := len(counts) * len(models); n > MaxVariants {
		return nil, fmt.Errorf("%d variants; at most %d are computed at once: %w", n, MaxVariants, errdefs.ErrInvalidArgument)
	}
	options := v.Tables.options(cfg)
	var all []*batch
	for _, model := range models {
		c := *applied
		c.Hypervisor.CPUModel = model
		plan, err := vc.CheckPod(podConfig(&c, p), options)
		if err != nil {
			return nil, err
		}
		sizes := counts
		if m.AnyCPUs = !plan.Platform().MeasuresCPUs(); m.AnyCPUs {
			sizes = []int{podsOwn}
		}
		_, ranges := plan.Platform().(ranger)
		for _, run := range runs(sizes, ranges) {
			all = append(all, newBatch(c, p, run))
		}
	}
	// Each reads and hashes all files.
	turns := make(chan struct{}, runtime.GOMAXPROCS(0))
	var done sync.WaitGroup
	for _, b := range all {
		done.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			b.values, b.err = b.measure(ctx, options)
		})
	}
	done.Wait()
	for _, b := range all {
		if b.err != nil {
			return nil, b.err
		}
		for _, r := range b.values {
			m.ReferenceValues = append(m.ReferenceValues, *r)
		}
	}
	return m, nil
}

// Unpredicted are the registers that could not be predicted, each with each reason once.
func (m *Measurement) Unpredicted() (all []tee.Unpredicted) {
	for _, r := range m.ReferenceValues {
		for _, u := range r.Unpredicted {
			if !slices.Contains(all, u) {
				all = append(all, u)
			}
		}
	}
	return all
}

// podsOwn is the number of CPUs that the pod itself asks for.
const podsOwn = 0

// batch is what is measured from one plan: one number of CPUs, or where the platform can, all of a range.
type batch struct {
	cfg    configs.Config
	pod    vc.PodConfig
	counts []int
	values []*tee.ReferenceValues
	err    error
}

func newBatch(cfg configs.Config, p *manifest.Pod, counts []int) *batch {
	b := &batch{cfg: cfg, counts: counts}
	b.pod = podConfig(&b.cfg, p)
	if counts[0] != podsOwn {
		b.pod.Resources.CPU = manifest.WholeCPUs(counts[0])
		b.cfg.Sizing.MaxVCPUs = 0
	}
	return b
}

// runs cuts numbers into ranges without a gap if ranges can be measured, else into single ones.
func runs(counts []int, ranges bool) (all [][]int) {
	for i, n := range counts {
		if last := len(all) - 1; ranges && i > 0 && counts[i-1] == n-1 {
			all[last] = append(all[last], n)
			continue
		}
		all = append(all, []int{n})
	}
	return all
}

// ranger measures one plan for each number of CPUs in a range, and reads the files once.
type ranger interface {
	MeasureRange(ctx context.Context, doc hypervisor.Document, first, last int) ([]*tee.ReferenceValues, error)
}

func (b *batch) measure(ctx context.Context, options platform.Options) ([]*tee.ReferenceValues, error) {
	plan, err := vc.CheckPod(b.pod, options)
	if err != nil {
		return nil, err
	}
	doc, err := plan.Dry(ctx)
	if err != nil {
		return nil, err
	}
	if r, ok := plan.Platform().(ranger); ok && len(b.counts) > 1 {
		return r.MeasureRange(ctx, *doc, b.counts[0], b.counts[len(b.counts)-1])
	}
	value, err := plan.Platform().Measure(ctx, *doc)
	return []*tee.ReferenceValues{value}, err
}
