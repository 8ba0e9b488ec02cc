// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// podPlan is what would be started for a pod.
type podPlan struct {
	Pod         string   `json:"pod"`
	Platform    tee.Name `json:"platform"`
	Description string   `json:"description"`
	// Started is always false: this is a plan.
	Started bool         `json:"started"`
	Refused []string     `json:"refused,omitempty"`
	Volumes []volumePlan `json:"volumes,omitempty"`
	Notes   []string     `json:"notes,omitempty"`
	// Document is nil where the pod is refused.
	Document *hypervisor.Document `json:"document,omitempty"`
	// Binary and Argv are the VMM's; with CommandError they are not known.
	Binary       string      `json:"binary,omitempty"`
	Argv         []string    `json:"argv,omitempty"`
	Files        []inherited `json:"inherited_files,omitempty"`
	CommandError string      `json:"command_error,omitempty"`
}

// inherited is an open file that the VMM is started with.
type inherited struct {
	FD   int    `json:"fd"`
	Name string `json:"name"`
	What string `json:"what"`
}

func planCommand() *cobra.Command {
	var (
		f    nodeFlags
		file string
	)
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show the VM that would be started for a pod, and the VMM's exact command line, without starting anything",
		Long: "plan goes the way of a pod's start up to the moment when the VMM would be started, and shows what it has by then:\n" +
			"the VM's description, the command line, and what becomes of the pod's volumes. Nothing is started or changed, and no\n" +
			"hardware is asked whether it could run the VM: cloister check does that.\n\n" +
			"The platform is that of --tee, else that of the pod's runtimeClassName if it is cloister-NAME, else the configured one.\n" +
			"A pod that asks for what is refused is answered with all of it, and exit status 1.",
		Example: "  cloister plan --tee snp -f pod.yaml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkName(f.tee); err != nil {
				return err
			}
			p := defaultPod()
			if file != "" {
				var err error
				if p, err = readPod(file, cmd.InOrStdin()); err != nil {
					return err
				}
			}
			var notes []string
			f.tee, notes = platformOf(f.tee, p)
			cfg, err := f.load()
			if err != nil {
				return err
			}
			plan, err := planPod(cmd.Context(), cfg, p)
			if err != nil {
				return err
			}
			plan.Notes = append(notes, plan.Notes...)
			if f.json {
				err = printJSON(cmd.OutOrStdout(), plan)
			} else {
				err = plan.print(cmd.OutOrStdout())
			}
			switch {
			case err != nil:
				return err
			case len(plan.Refused) > 0:
				return fmt.Errorf("the pod would be refused for %s", plural(len(plan.Refused), "reason"))
			case plan.CommandError != "":
				return errors.New("the VMM could not be started")
			}
			return nil
		},
	}
	f.add(cmd, "plan for this platform: none, sample, snp, tdx or se (default: the pod's or the configured one)")
	cmd.Flags().StringVarP(&file, "file", "f", "", "manifest of a Pod, YAML or JSON; - is standard input (default: a pod without limits and volumes)")
	return cmd
}

// platformOf is the platform that a pod's class names, where the command line names none.
func platformOf(given string, p *pod) (name string, notes []string) {
	const class = "cloister"
	switch rest, ours := strings.CutPrefix(p.Spec.RuntimeClassName, class+"-"); {
	case p.Spec.RuntimeClassName == "" || p.Spec.RuntimeClassName == class:
		return given, nil
	case ours && slices.Contains(tee.Names(), tee.Name(rest)):
		if given != "" && given != rest {
			return given, []string{fmt.Sprintf("runtimeClassName is %s and the plan is for --tee %s", p.Spec.RuntimeClassName, given)}
		}
		return rest, nil
	default:
		return given, []string{fmt.Sprintf("runtimeClassName %s names no platform: whether it is one of Cloister's, containerd's configuration says", p.Spec.RuntimeClassName)}
	}
}

// planPod plans a pod. What the pod is refused for is in the plan; an error is the configuration's or the machine's.
func planPod(ctx context.Context, cfg *configs.Config, p *pod) (*podPlan, error) {
	name := tee.Name(cfg.TEE.Platform)
	plan := &podPlan{
		Pod: cmp.Or(p.Metadata.Namespace, "default") + "/" + p.Metadata.Name, Platform: name, Description: name.Describe(),
		Refused: p.Spec.refusals(), Volumes: p.Spec.volumes(name),
	}
	if ignored := cfg.IgnoredAnnotations(p.Metadata.Annotations); len(ignored) > 0 {
		plan.Notes = append(plan.Notes, "annotations without effect, since annotations.allowed does not list them: "+strings.Join(ignored, ", "))
	}
	applied, err := cfg.ApplyAnnotations(p.Metadata.Annotations)
	if err != nil {
		var all configs.Faults
		if !errors.As(err, &all) {
			return nil, err
		}
		for _, f := range all {
			plan.Refused = append(plan.Refused, f.String())
		}
		applied = cfg
	}
	doc, _, err := vc.PlanVM(ctx, podConfig(applied, p))
	var refused *vc.RefusedError
	switch {
	case errors.As(err, &refused):
		for _, r := range refused.Reasons {
			plan.Refused = append(plan.Refused, strings.ReplaceAll(r, kubeletPod, "…"))
		}
	case err != nil:
		return nil, err
	}
	if len(plan.Refused) > 0 {
		return plan, nil
	}
	plan.Document = doc
	plan.command(ctx, applied)
	return plan, nil
}

// firstFD is the first inherited file after the standard ones; the VMM's driver counts from it.
const firstFD = 3

// command adds the VMM's command line, or why there is none.
func (p *podPlan) command(ctx context.Context, cfg *configs.Config) {
	driver, err := qemu.New(ctx, qemu.Config{Path: cfg.Hypervisor.Path, Arch: p.Document.Architecture})
	if err == nil {
		err = p.commandFor(driver.Path(), driver.Features())
	}
	if err != nil {
		p.CommandError = err.Error()
	}
}

// commandFor is command for a binary with given features.
func (p *podPlan) commandFor(binary string, features qemu.Features) error {
	if err := qemu.Validate(*p.Document); err != nil {
		return err
	}
	drivers := make(map[string]string)
	for _, d := range p.Document.Disks {
		drivers[d.ID] = "file"
	}
	line, err := qemu.NewCommandLine(*p.Document, features, drivers)
	if err != nil {
		return err
	}
	p.Binary, p.Argv = binary, line.Args
	for i, name := range line.Files {
		p.Files = append(p.Files, inherited{firstFD + i, name, describeFile(name)})
	}
	return nil
}

func describeFile(name string) string {
	kind, id, _ := strings.Cut(name, ":")
	switch kind {
	case "qmp":
		return "socket to the shim: control (QMP)"
	case "console":
		return "socket to the shim: the guest's console"
	case "vsock":
		return "vsock: /dev/vhost-vsock, or a socket to the shim's own device"
	case "tap":
		return "tap of the network interface " + id
	case "vhost":
		return "/dev/vhost-net for the network interface " + id
	}
	return name
}

func (p *podPlan) print(w io.Writer) error {
	out := printer{w: w}
	out.line("pod       %s", p.Pod)
	out.line("platform  %s", p.Description)
	out.line("          This is a plan: nothing was started, and nobody was asked whether this host could.")
	for _, n := range p.Notes {
		out.line("note      %s", n)
	}
	if len(p.Volumes) > 0 {
		out.line("\nvolumes:")
	}
	for _, v := range p.Volumes {
		out.line("  %-20s %-22s %-13s %s", v.Name, v.Kind, v.Becomes, v.Detail)
	}
	if len(p.Refused) > 0 {
		out.line("\nrefused:")
		for _, r := range p.Refused {
			out.line("  - %s", r)
		}
		return out.err
	}
	doc, err := json.MarshalIndent(p.Document, "", "  ")
	if err != nil {
		return err
	}
	out.line("\nVM:\n%s", doc)
	if p.CommandError != "" {
		out.line("\ncommand line: none.\n  %s", p.CommandError)
		return out.err
	}
	out.line("\ncommand line:\n%s", shellLines(p.Binary, p.Argv))
	out.line("\ninherited files:")
	for _, f := range p.Files {
		out.line("  fd=%d  %s", f.FD, f.What)
	}
	out.line("\nThe id %q stands for the one that containerd makes; the pod's network interfaces come at its start.", podID)
	return out.err
}

// shellLines is a command as a shell takes it, an option with its value on each line.
func shellLines(binary string, args []string) string {
	var b strings.Builder
	b.WriteString(shellQuote(binary))
	for _, a := range args {
		if strings.HasPrefix(a, "-") {
			b.WriteString(" \\\n  ")
		} else {
			b.WriteString(" ")
		}
		b.WriteString(shellQuote(a))
	}
	return b.String()
}

// shellQuote leaves alone what no shell would change.
func shellQuote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./,:=+@%", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
