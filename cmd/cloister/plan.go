// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

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
			p, err := readPod(file, cmd.InOrStdin())
			if err != nil {
				return err
			}
			var notes []string
			f.tee, notes = dryrun.PlatformOf(f.tee, p)
			cfg, err := f.load()
			if err != nil {
				return err
			}
			plan, err := dryrun.Plan(cmd.Context(), cfg, p)
			if err != nil {
				return err
			}
			plan.Notes = append(notes, plan.Notes...)
			if f.json {
				err = printJSON(cmd.OutOrStdout(), plan)
			} else {
				err = printPlan(cmd.OutOrStdout(), plan)
			}
			switch {
			case err != nil:
				return err
			case len(plan.Refused) > 0:
				return fmt.Errorf("the pod would be refused for %s", plural(len(plan.Refused), "reason"))
			}
			return plan.Err
		},
	}
	f.add(cmd, "plan for this platform: none, sample, snp, tdx or se (default: the pod's or the configured one)")
	cmd.Flags().StringVarP(&file, "file", "f", "",
		"manifest of a Pod, YAML or JSON; - is standard input (default: a pod without limits and volumes)")
	return cmd
}

func printPlan(w io.Writer, p *dryrun.PodPlan) error {
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
		detail := v.Detail
		if v.Becomes == dryrun.Refused {
			detail = "see below"
		}
		out.line("  %-20s %-22s %-13s %s", v.Name, v.Kind, v.Becomes, detail)
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
	for i, r := range p.Requests {
		if i == 0 {
			out.line("\nrequests to its socket:")
		}
		out.line("  %s %s %s", r.Method, r.Path, r.Body)
	}
	out.line("\nThe id %q stands for the one that containerd makes; the pod's network interfaces come at its start.", dryrun.PodID)
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
