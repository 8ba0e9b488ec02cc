// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
)

// Result of looking at one thing.
type Result string

// Results.
const (
	Good Result = "ok"
	Note Result = "note" // works, but a user may want to know
	Bad  Result = "MISSING"
)

// Finding is what was seen of one thing.
type Finding struct {
	What   string `json:"what"`
	Result Result `json:"result"`
	Detail string `json:"detail,omitempty"`
	// Fix says what to do; set with Bad.
	Fix string `json:"fix,omitempty"`
}

// Report is what a check found.
type Report struct {
	// Usable: pods of the platform that was asked for can start; with AllPlatforms, those of the configured one.
	Usable bool `json:"usable"`
	// Node is what holds for every platform.
	Node      []Finding       `json:"node"`
	Platforms []PlatformCheck `json:"platforms"`
}

// PlatformCheck is about one platform.
type PlatformCheck struct {
	Platform    tee.Name  `json:"platform"`
	Description string    `json:"description"`
	Configured  bool      `json:"configured"`
	Usable      bool      `json:"usable"`
	Findings    []Finding `json:"findings"`
}

// AllPlatforms asks Check for every platform.
const AllPlatforms = "all"

// Check looks at everything that pods need on this node, in the order in which a pod's start needs it. The configuration is
// the one that the shim would read with this path; the platform is one of package tee, AllPlatforms, or empty for the
// configured one.
func Check(ctx context.Context, path, name string) Report {
	cfg, err := configs.Load(path)
	if err != nil {
		return Report{Node: faults("configuration", err), Platforms: []PlatformCheck{}}
	}
	r := Report{Node: checkNode()}
	configured := tee.Name(cfg.TEE.Platform)
	names, decisive := []tee.Name{configured}, configured
	switch name {
	case "":
	case AllPlatforms:
		names = tee.Names()
	default:
		names, decisive = []tee.Name{tee.Name(name)}, tee.Name(name)
	}
	for _, n := range names {
		p := checkPlatform(ctx, cfg, n)
		p.Configured = n == configured
		p.Usable = Missing(p.Findings) == 0
		if n == decisive {
			r.Usable = p.Usable && Missing(r.Node) == 0
		}
		r.Platforms = append(r.Platforms, p)
	}
	return r
}

// Missing counts what is missing.
func Missing(findings []Finding) int {
	n := 0
	for _, f := range findings {
		if f.Result == Bad {
			n++
		}
	}
	return n
}

// checkNode looks at what every pod needs.
func checkNode() []Finding {
	return []Finding{
		{What: "configuration", Result: Good},
		openable("tap devices", "/dev/net/tun", "load the module tun"),
		checkCgroups(),
	}
}

func checkCgroups() Finding {
	const what = "cgroups"
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	switch {
	case err != nil:
		return Finding{What: what, Result: Bad, Detail: err.Error(), Fix: "mount /proc"}
	case len(mounts) == 0:
		return Finding{What: what, Result: Bad, Detail: "no cgroup hierarchy is mounted", Fix: "mount cgroup2 at /sys/fs/cgroup"}
	case slices.ContainsFunc(mounts, func(m *mountinfo.Info) bool { return m.FSType == "cgroup" }):
		return Finding{What: what, Result: Good, Detail: "version 1, or both versions"}
	}
	return Finding{What: what, Result: Good, Detail: "version 2"}
}

func openable(what, path, fix string) Finding {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return Finding{What: what, Result: Bad, Detail: err.Error(), Fix: fix}
	}
	_ = f.Close()
	return Finding{What: what, Result: Good, Detail: path}
}

// fixNamed is for errors that say themselves what to do.
const fixNamed = "correct what is named"

// faults makes a line each of an error's faults. But for those, an error is one line.
func faults(what string, err error) []Finding {
	var all configs.Faults
	if !errors.As(err, &all) {
		return []Finding{{What: what, Result: Bad, Detail: oneLine(err.Error()), Fix: fixNamed}}
	}
	out := make([]Finding, 0, len(all))
	for _, f := range all {
		detail := f.Reason
		if f.Key != "" {
			detail = f.Key + ": " + detail
		}
		switch {
		case f.File != "" && f.Line > 0:
			detail = fmt.Sprintf("%s:%d: %s", f.File, f.Line, detail)
		case f.File != "":
			detail = f.File + ": " + detail
		}
		out = append(out, Finding{What: what, Result: Bad, Detail: oneLine(detail), Fix: cmp.Or(f.Fix, fixNamed)})
	}
	return out
}

// oneLine keeps what others said in a line of its own.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(s, "\n", "; ")), " ")
}
