// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

func checkCommand() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Tell what this node offers for running pods and what is missing, each line with the fix",
		Long: "check reads the configuration as the shim does and looks at what pods need on this node: for ordinary VMs, or for\n" +
			"those of the platform that --tee names, in the order in which the platform is set up. It starts no VM and changes\n" +
			"nothing.\n\n" +
			"Exit status, for readiness scripts: 0 pods can start, 1 something is missing, 2 wrong usage. With --tee all every\n" +
			"platform is listed, and the status is that of the configured one.",
		Example: "  cloister check --tee snp && kubectl label node \"$NODE\" io.cloister/tee-snp=true",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.tee != dryrun.AllPlatforms {
				if err := checkName(f.tee); err != nil {
					return err
				}
			}
			report := dryrun.Check(cmd.Context(), f.config, f.tee)
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), report); err != nil {
					return err
				}
			} else if err := printReport(cmd.OutOrStdout(), report); err != nil {
				return err
			}
			if !report.Usable {
				return verdict(report)
			}
			return nil
		},
	}
	f.add(cmd, "look at this platform: none, sample, snp, tdx, se, or all (default: the configured one)")
	return cmd
}

// verdict is the error of a node that is not usable.
func verdict(r dryrun.Report) error {
	all, gone, of := len(r.Node), dryrun.Missing(r.Node), ""
	for _, p := range r.Platforms {
		if len(r.Platforms) == 1 || p.Configured {
			all, gone = all+len(p.Findings), gone+dryrun.Missing(p.Findings)
			of = fmt.Sprintf(" of platform %q", p.Platform)
		}
	}
	return fmt.Errorf("%d of %s failed: pods%s will not start", gone, plural(all, "check"), of)
}

func printReport(w io.Writer, r dryrun.Report) error {
	p := printer{w: w}
	p.findings(r.Node)
	for _, one := range r.Platforms {
		if len(r.Platforms) > 1 {
			mark := ""
			if one.Configured {
				mark = ", configured"
			}
			verdict := "usable"
			if !one.Usable || dryrun.Missing(r.Node) > 0 {
				verdict = fmt.Sprintf("NOT usable, %d missing", dryrun.Missing(one.Findings)+dryrun.Missing(r.Node))
			}
			p.line("\n%s%s: %s", one.Description, mark, verdict)
		}
		p.findings(one.Findings)
	}
	return p.err
}

// printer keeps the first error of many writes.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, a ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", a...)
	}
}

func (p *printer) findings(all []dryrun.Finding) {
	for _, f := range all {
		p.line("%-8s %-27s %s", f.Result, f.What, f.Detail)
		if f.Fix != "" {
			p.line("%-8s %-27s   fix: %s", "", "", f.Fix)
		}
	}
}
