// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"
)

// limit is a budget: at most, or at least, a value.
type limit struct {
	Value   float64 `json:"value"`
	AtLeast bool    `json:"at_least,omitempty"`
}

func atMost(v float64) *limit  { return &limit{Value: v} }
func atLeast(v float64) *limit { return &limit{Value: v, AtLeast: true} }

func (l *limit) met(v float64) bool {
	if l.AtLeast {
		return v >= l.Value
	}
	return v <= l.Value
}

func (l *limit) text(unit string) string {
	if l == nil {
		return "–"
	}
	sign := "≤ "
	if l.AtLeast {
		sign = "≥ "
	}
	return sign + strings.TrimSuffix(fmt.Sprintf("%.2f", l.Value), ".00") + unit
}

// samples of one quantity, in the order in which they were taken.
type samples struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Values []float64 `json:"values"`
}

func (s *samples) add(v float64) { s.Values = append(s.Values, v) }

func (s *samples) text() string {
	if s == nil || len(s.Values) == 0 {
		return "–"
	}
	m := median(s.Values)
	format := "%.0f %s"
	if m < 100 {
		format = "%.1f %s"
	}
	return fmt.Sprintf(format, m, s.Unit)
}

// row is a line of the table.
type row struct {
	What string `json:"what"`
	// Ours and Beside are what Value was computed from; Beside may be missing.
	Ours   *samples `json:"ours,omitempty"`
	Beside *samples `json:"beside,omitempty"`
	// Value has the Unit; a ratio has none.
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
	// Budget is the design's, First the first target; a row without is for information.
	Budget *limit `json:"budget,omitempty"`
	First  *limit `json:"first_target,omitempty"`
	// Note says what else must be known to read the figure, Missing why there is none.
	Note    string `json:"note,omitempty"`
	Missing string `json:"missing,omitempty"`
}

// ratioRow is ours ÷ beside.
func ratioRow(what string, ours, beside *samples) row {
	r := row{What: what, Ours: ours, Beside: beside}
	if base := median(beside.Values); base > 0 && len(ours.Values) > 0 {
		r.Value = median(ours.Values) / base
	} else {
		r.Missing = "no samples"
	}
	return r
}

func (r row) budgeted(budget, first *limit) row {
	r.Budget, r.First = budget, first
	return r
}

func (r row) noted(format string, args ...any) row {
	r.Note = fmt.Sprintf(format, args...)
	return r
}

func (r row) verdict() string {
	switch {
	case r.Missing != "":
		return "not measured: " + r.Missing
	case r.Budget == nil:
		return "reported"
	case r.Budget.met(r.Value):
		return "met"
	case r.First != nil && r.First.met(r.Value):
		return "first target met"
	}
	return "not met"
}

func (r row) value() string {
	switch {
	case r.Missing != "":
		return "–"
	case r.Unit == "":
		return fmt.Sprintf("%.2f", r.Value)
	}
	return fmt.Sprintf("%.1f%s", r.Value, r.Unit)
}

// machine is what the figures were taken on.
type machine struct {
	CPU         string `json:"cpu"`
	CPUs        int    `json:"cpus"`
	MemoryMiB   int    `json:"memory_mib"`
	HostKernel  string `json:"host_kernel"`
	GuestKernel string `json:"guest_kernel"`
	QEMU        string `json:"qemu"`
	Accelerator string `json:"accelerator"`
	// Load is the average of the last minute when the run began: what else went on.
	Load string `json:"load_at_start"`
}

type report struct {
	Started  time.Time `json:"started"`
	Took     string    `json:"took"`
	Command  string    `json:"command"`
	Plan     plan      `json:"plan"`
	Machine  machine   `json:"machine"`
	Rows     []row     `json:"rows"`
	Failures []string  `json:"failures,omitempty"`
}

// missed names the rows that meet neither budget nor first target.
func (r *report) missed() []string {
	var out []string
	for _, l := range r.Rows {
		if v := l.verdict(); v == "not met" {
			out = append(out, l.What)
		}
	}
	return out
}

var header = []string{"what", "measured", "Cloister", "beside it", "budget", "first target", "verdict"}

func (r row) cells() []string {
	beside := r.Beside.text()
	if r.Beside != nil {
		beside += " (" + r.Beside.Name + ")"
	}
	return []string{r.What, r.value(), r.Ours.text(), beside, r.Budget.text(r.Unit), r.First.text(r.Unit), r.verdict()}
}

func (r *report) facts() string {
	m := r.Machine
	return fmt.Sprintf("%s, accelerator %s, guest kernel %s; %d CPUs (%s), %d MiB, host kernel %s, load %s at the start.\n"+
		"Medians of %d starts, %d execs, %d streams and reads, one run, in turns with the baseline; %s, took %s.\n",
		m.QEMU, m.Accelerator, m.GuestKernel, m.CPUs, m.CPU, m.MemoryMiB, m.HostKernel, m.Load,
		r.Plan.Rounds, r.Plan.Execs, r.Plan.Rounds, r.Started.Format(time.DateOnly), r.Took)
}

// text is the table for a terminal.
func (r *report) text() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.ToUpper(strings.Join(header, "\t")))
	for _, l := range r.Rows {
		fmt.Fprintln(w, strings.Join(l.cells(), "\t"))
	}
	w.Flush()
	b.WriteString("\n" + r.facts())
	return b.String()
}

// markdown is the table for docs/performance.md.
func (r *report) markdown() string {
	var b strings.Builder
	line := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	line(header)
	b.WriteString(strings.Repeat("|---", len(header)) + "|\n")
	for _, l := range r.Rows {
		line(l.cells())
	}
	b.WriteString("\n" + r.facts())
	var notes []string
	for _, l := range r.Rows {
		if l.Note != "" {
			notes = append(notes, fmt.Sprintf("- **%s**: %s\n", l.What, l.Note))
		}
	}
	for _, f := range r.Failures {
		notes = append(notes, "- **failed**: "+f+"\n")
	}
	if len(notes) > 0 {
		b.WriteString("\n" + strings.Join(notes, ""))
	}
	return b.String()
}

// write makes bench.json and bench.md in dir, which is there.
func (r *report) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bench.json"), append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "bench.md"), []byte(r.markdown()), 0o644)
}
