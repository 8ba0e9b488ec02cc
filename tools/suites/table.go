// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// limitsHeading is the section of docs/limits.md whose table lists the specs that do not pass.
const limitsHeading = "## Specs of other suites that do not pass"

// limit is a row of that table.
type limit struct{ suite, spec, why string }

// readLimits reads the table: | suite | spec | why |. A suite "critest" stands for both ways in which critest is run, and a
// spec is given by how its name ends: whole names do not fit a line.
func readLimits(path string) ([]limit, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var limits []limit
	inside := false
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			inside = line == limitsHeading
			continue
		}
		cells := strings.Split(line, "|")
		if !inside || len(cells) < 2 || strings.HasPrefix(line, "|---") || strings.HasPrefix(line, "| suite") {
			continue
		}
		if len(cells) != 5 {
			return nil, fmt.Errorf("%s: %q is not | suite | spec | why |", path, line)
		}
		trim := func(s string) string { return strings.Trim(strings.TrimSpace(s), "`") }
		limits = append(limits, limit{trim(cells[1]), trim(cells[2]), strings.TrimSpace(cells[3])})
	}
	return limits, lines.Err()
}

// baselineSuite is the suite with runc that one with Cloister is compared with.
func baselineSuite(name string) string { return strings.TrimSuffix(name, "-classic") }

// row is what became of one spec that runc passes and Cloister does not.
type row struct {
	suite, spec string
	ours        Result
	// why it is so, from docs/limits.md; empty if it is not there.
	why string
}

// count is the line of a suite.
type count struct {
	suite                               string
	specs, runc, cloister, both, except int
	runcSeconds, seconds                float64
}

// comparison is what the table is made of.
type comparison struct {
	baseline, ours *Report
	counts         []count
	// different lists what passes with runc and not with Cloister; neither what passes with none of both.
	different, neither []row
	// passing lists limits whose spec passes.
	passing []limit
}

func compare(baseline, ours *Report, limits []limit) *comparison {
	c := &comparison{baseline: baseline, ours: ours}
	specs := func(s Suite) map[string]Result {
		m := map[string]Result{}
		for _, r := range s.Results {
			m[r.Spec] = r
		}
		return m
	}
	used := map[limit]bool{}
	for _, s := range ours.Suites {
		at := slices.IndexFunc(baseline.Suites, func(b Suite) bool { return b.Name == baselineSuite(s.Name) })
		if at < 0 {
			continue
		}
		theirs, mine := specs(baseline.Suites[at]), specs(s)
		n := count{suite: s.Name, runcSeconds: baseline.Suites[at].Seconds, seconds: s.Seconds}
		for _, spec := range slices.Sorted(maps.Keys(theirs)) {
			n.specs++
			r, ran := mine[spec]
			if !ran {
				r = Result{Spec: spec, State: Failed, Reason: "it did not run"}
			}
			passed := theirs[spec].State == Passed
			if passed {
				n.runc++
			}
			if r.State == Passed {
				n.cloister++
			}
			if passed && r.State == Passed {
				n.both++
			}
			why := ""
			for _, l := range limits {
				if (l.suite == s.Name || l.suite == baselineSuite(s.Name)) && strings.HasSuffix(spec, l.spec) {
					why = l.why
					used[l] = used[l] || r.State != Passed
				}
			}
			switch {
			case passed && r.State != Passed:
				n.except++
				c.different = append(c.different, row{s.Name, spec, r, why})
			case !passed && r.State != Passed:
				c.neither = append(c.neither, row{s.Name, spec, theirs[spec], ""})
			}
		}
		c.counts = append(c.counts, n)
	}
	for _, l := range limits {
		ran := slices.ContainsFunc(c.counts, func(n count) bool { return n.suite == l.suite || baselineSuite(n.suite) == l.suite })
		if ran && !used[l] && ours.Focus == "" {
			c.passing = append(c.passing, l)
		}
	}
	return c
}

// fault reports what makes the run fail: a difference without a reason in docs/limits.md, and a reason without a difference.
func (c *comparison) fault() error {
	var faults []error
	for _, r := range c.different {
		if r.why == "" {
			faults = append(faults, fmt.Errorf("%s: %s passes with runc and not with Cloister", r.suite, r.spec))
		}
	}
	for _, l := range c.passing {
		faults = append(faults, fmt.Errorf("%s: %s passes, or is not there: take it out of docs/limits.md", l.suite, l.spec))
	}
	return errors.Join(faults...)
}

// text is the comparison for a terminal, and for docs/conformance.md: Markdown.
func (c *comparison) text() string {
	var b strings.Builder
	b.WriteString("| suite | specs | passed with runc | passed with Cloister | passed with runc only | seconds, runc | seconds, Cloister |\n")
	b.WriteString("|---|---|---|---|---|---|---|\n")
	for _, n := range c.counts {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %.0f | %.0f |\n", n.suite, n.specs, n.runc, n.cloister, n.except, n.runcSeconds, n.seconds)
	}
	if len(c.different) > 0 {
		b.WriteString("\nPassed with runc only:\n\n| suite | spec | with Cloister | why |\n|---|---|---|---|\n")
		for _, r := range c.different {
			why := r.why
			if why == "" {
				why = "**not explained**"
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.suite, cell(r.spec), r.ours.State, why)
		}
	}
	if len(c.neither) > 0 {
		b.WriteString("\nPassed with neither:\n\n| suite | spec | with runc | what it says |\n|---|---|---|---|\n")
		for _, r := range c.neither {
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.suite, cell(r.spec), r.ours.State, cell(lastLine(r.ours.Reason)))
		}
	}
	return b.String()
}

// cell makes a text fit a table's cell.
func cell(s string) string {
	s = strings.Join(strings.Fields(strings.ReplaceAll(s, "|", "\\|")), " ")
	if r := []rune(s); len(r) > 110 {
		s = string(r[:110]) + "…"
	}
	return s
}

// lastLine is the last line that says something: Go's and ginkgo's own closing lines do not.
func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for _, line := range slices.Backward(lines) {
		line = strings.TrimSpace(line)
		if line != "" && line != "FAIL" && line != "PASS" && !strings.HasPrefix(line, "--- ") && !strings.HasPrefix(line, "=== ") &&
			!strings.HasPrefix(line, "testing: ") {
			return line
		}
	}
	return ""
}

// Marks in docs/conformance.md between which the table stands.
const (
	tableBegin = "<!-- table -->\n"
	tableEnd   = "<!-- end of the table -->\n"
)

// writeDocs replaces what stands between the marks.
func writeDocs(path string, c *comparison) error {
	if c.ours.Focus != "" || c.baseline.Focus != "" {
		return errors.New("docs/conformance.md is made of runs of everything, and these had a -focus")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(data), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %q and %q", path, strings.TrimSpace(tableBegin), strings.TrimSpace(tableEnd))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Run on %s (Cloister) and %s (runc), under emulation, with", c.ours.Date, c.baseline.Date)
	for i, name := range slices.Sorted(maps.Keys(c.ours.Versions)) {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, "\n%s: `%s`", name, c.ours.Versions[name])
	}
	b.WriteString(".\n\n" + c.text())
	return os.WriteFile(path, []byte(before+tableBegin+b.String()+tableEnd+after), 0o644)
}
