// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
)

// Results of a check.
const (
	good = "ok"
	note = "note" // works, but a user may want to know
	bad  = "MISSING"
)

// finding is one line of the check.
type finding struct {
	What   string `json:"what"`
	Result string `json:"result"`
	Detail string `json:"detail,omitempty"`
	Fix    string `json:"fix,omitempty"`
}

// checkReport is what a check found.
type checkReport struct {
	// Usable: pods of the platform that was asked for can start; with all, those of the configured one.
	Usable bool `json:"usable"`
	// Node is what holds for every platform.
	Node      []finding       `json:"node"`
	Platforms []platformCheck `json:"platforms"`
}

// platformCheck is about one platform.
type platformCheck struct {
	Platform    tee.Name  `json:"platform"`
	Description string    `json:"description"`
	Configured  bool      `json:"configured"`
	Usable      bool      `json:"usable"`
	Findings    []finding `json:"findings"`
}

// teeAll is every platform.
const teeAll = "all"

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
			if f.tee != teeAll {
				if err := checkName(f.tee); err != nil {
					return err
				}
			}
			report := check(cmd.Context(), f.config, f.tee)
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), report); err != nil {
					return err
				}
			} else if err := report.print(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !report.Usable {
				return report.verdict()
			}
			return nil
		},
	}
	f.add(cmd, "look at this platform: none, sample, snp, tdx, se, or all (default: the configured one)")
	return cmd
}

// check looks at everything in the order in which a pod's start needs it.
func check(ctx context.Context, path, name string) checkReport {
	cfg, err := configs.Load(path)
	if err != nil {
		return checkReport{Node: faults("configuration", err), Platforms: []platformCheck{}}
	}
	r := checkReport{Node: checkNode()}
	configured := tee.Name(cfg.TEE.Platform)
	names, decisive := []tee.Name{configured}, configured
	switch name {
	case "":
	case teeAll:
		names = tee.Names()
	default:
		names, decisive = []tee.Name{tee.Name(name)}, tee.Name(name)
	}
	for _, n := range names {
		p := checkPlatform(ctx, cfg, n)
		p.Configured = n == configured
		p.Usable = missing(p.Findings) == 0
		if n == decisive {
			r.Usable = p.Usable && missing(r.Node) == 0
		}
		r.Platforms = append(r.Platforms, p)
	}
	return r
}

func missing(findings []finding) int {
	n := 0
	for _, f := range findings {
		if f.Result == bad {
			n++
		}
	}
	return n
}

// verdict is the error of a node that is not usable.
func (r checkReport) verdict() error {
	all, gone, of := len(r.Node), missing(r.Node), ""
	for _, p := range r.Platforms {
		if len(r.Platforms) == 1 || p.Configured {
			all, gone = all+len(p.Findings), gone+missing(p.Findings)
			of = fmt.Sprintf(" of platform %q", p.Platform)
		}
	}
	return fmt.Errorf("%d of %s failed: pods%s will not start", gone, plural(all, "check"), of)
}

func (r checkReport) print(w io.Writer) error {
	p := printer{w: w}
	p.findings(r.Node)
	for _, one := range r.Platforms {
		if len(r.Platforms) > 1 {
			mark := ""
			if one.Configured {
				mark = ", configured"
			}
			verdict := "usable"
			if !one.Usable || missing(r.Node) > 0 {
				verdict = fmt.Sprintf("NOT usable, %d missing", missing(one.Findings)+missing(r.Node))
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

func (p *printer) findings(all []finding) {
	for _, f := range all {
		p.line("%-8s %-27s %s", f.Result, f.What, f.Detail)
		if f.Fix != "" {
			p.line("%-8s %-27s   fix: %s", "", "", f.Fix)
		}
	}
}

// faults turns an error of package configs into a line each.
func faults(what string, err error) []finding {
	var all configs.Faults
	if !errors.As(err, &all) {
		return []finding{{What: what, Result: bad, Detail: err.Error()}}
	}
	out := make([]finding, 0, len(all))
	for _, f := range all {
		detail := f.Reason
		if f.Key != "" {
			detail = f.Key + ": " + detail
		}
		if f.File != "" {
			detail = f.File + ": " + detail
		}
		out = append(out, finding{What: what, Result: bad, Detail: detail, Fix: f.Fix})
	}
	return out
}
