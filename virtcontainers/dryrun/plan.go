// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	vc "github.com/cloister-project/cloister/virtcontainers"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

// PodPlan is what would be started for a pod.
type PodPlan struct {
	Pod         string   `json:"pod"`
	Platform    tee.Name `json:"platform"`
	Description string   `json:"description"`
	// Started is always false: this is a plan.
	Started bool `json:"started"`
	// Refused are all reasons for which the pod would not start.
	Refused []string `json:"refused,omitempty"`
	Volumes []Volume `json:"volumes,omitempty"`
	Notes   []string `json:"notes,omitempty"`
	// Document is nil where the pod is refused.
	Document *hypervisor.Document `json:"document,omitempty"`
	// Binary, Argv, Files and Requests say how the VMM would be run (hypervisor.Invocation); with CommandError that is not
	// known.
	Binary       string                     `json:"binary,omitempty"`
	Argv         []string                   `json:"argv,omitempty"`
	Files        []hypervisor.InheritedFile `json:"inherited_files,omitempty"`
	Requests     []hypervisor.Request       `json:"requests,omitempty"`
	CommandError string                     `json:"command_error,omitempty"`
	// Err is CommandError.
	Err error `json:"-"`
}

// Plan plans a pod. What the pod is refused for, the configuration's faults among it, or why its VMM could not be started, is
// in the plan; an error is the machine's.
func Plan(ctx context.Context, cfg *configs.Config, p *manifest.Pod) (*PodPlan, error) {
	name := tee.Name(cfg.TEE.Platform)
	plan := &PodPlan{
		Pod: cmp.Or(p.Metadata.Namespace, "default") + "/" + p.Metadata.Name, Platform: name, Description: name.Describe(),
		Refused: refusals(p.Spec),
	}
	if ignored := cfg.IgnoredAnnotations(p.Metadata.Annotations); len(ignored) > 0 {
		plan.Notes = append(plan.Notes, "annotations without effect, since annotations.allowed does not list them: "+strings.Join(ignored, ", "))
	}
	var faults configs.Faults
	applied, err := cfg.ApplyAnnotations(p.Metadata.Annotations)
	if err != nil {
		if !errors.As(err, &faults) {
			return nil, err
		}
		for _, f := range faults {
			plan.Refused = append(plan.Refused, f.String())
		}
		applied = cfg
	}
	plan.Volumes = volumesOf(applied, p.Spec)
	vm, err := vc.CheckPod(podConfig(applied, p), platform.Options{})
	var refused *vc.RefusedError
	switch {
	case errors.As(err, &faults):
		// The node's or the pod's own, by an annotation: nobody else's pods need be refused for them.
		for _, f := range faults {
			plan.Refused = append(plan.Refused, f.String())
		}
	case errors.As(err, &refused):
		for _, r := range refused.Reasons {
			plan.Refused = append(plan.Refused, shorten(r))
		}
	case err != nil:
		return nil, err
	}
	if len(plan.Refused) > 0 {
		return plan, nil
	}
	if plan.Document, err = vm.Dry(ctx); err != nil {
		return nil, err
	}
	plan.Description = vm.Describe(plan.Document)
	plan.command(ctx, vm.Driver())
	return plan, nil
}

// command adds how the VMM would be run, or why it cannot be.
func (p *PodPlan) command(ctx context.Context, driver hypervisor.Driver) {
	run, err := driver.Describe(ctx, *p.Document)
	if err != nil {
		p.Err = fmt.Errorf("the VMM could not be started: %w", err)
		p.CommandError = err.Error()
		return
	}
	p.Binary, p.Argv, p.Files, p.Requests = run.Binary, run.Args, run.Files, run.Requests
}
