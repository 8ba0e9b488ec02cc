// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// report shows progress while stages run and keeps what the table at the end needs.
type report struct {
	out    io.Writer
	stages []stage
	memory []row
	proof  []comparison
	boot   []row
}

type stage struct {
	name, result string
	took         time.Duration
}

type row struct{ name, value string }

// comparison is one line of the proof: what a container sees beside what the host has.
type comparison struct{ what, inside, host string }

// stage runs one step, named by what it does, and shows its result and time.
func (r *report) stage(ctx context.Context, name string, step func(context.Context) (string, error)) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	fmt.Fprintf(r.out, "==> %s\n", name)
	started := time.Now()
	result, err := step(ctx)
	s := stage{name, result, time.Since(started)}
	if err != nil {
		fmt.Fprintf(r.out, "    failed after %s\n", seconds(s.took))
		return fmt.Errorf("%s: %w", name, err)
	}
	r.stages = append(r.stages, s)
	fmt.Fprintf(r.out, "    %s", seconds(s.took))
	if result != "" {
		fmt.Fprintf(r.out, "  %s", result)
	}
	fmt.Fprintln(r.out)
	return nil
}

// print shows the table at the end.
func (r *report) print() {
	fmt.Fprintln(r.out)
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STAGE\tTIME\tRESULT")
	var total time.Duration
	for _, s := range r.stages {
		fmt.Fprintf(w, "%s\t%s\t%s\n", s.name, seconds(s.took), s.result)
		total += s.took
	}
	fmt.Fprintf(w, "all\t%s\t\n", seconds(total))
	r.rows(w, "BOOT TIMELINE", r.boot)
	r.rows(w, "MEMORY", r.memory)
	fmt.Fprintf(w, "\nPROOF\tIN THE CONTAINER\tON THE HOST\n")
	for _, c := range r.proof {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.what, c.inside, c.host)
	}
	w.Flush()
	fmt.Fprintln(r.out)
}

func (r *report) rows(w io.Writer, title string, rows []row) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", title)
	for _, l := range rows {
		fmt.Fprintf(w, "%s\t%s\n", l.name, l.value)
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// timeline reads what the sandbox's status says of its boot: "name=milliseconds" pairs, those of the guest marked by
// "guest:" and counted from its kernel's start.
func timeline(text string) []row {
	var rows []row
	for _, pair := range strings.Fields(text) {
		name, ms, ok := strings.Cut(pair, "=")
		if !ok {
			continue
		}
		if guest, isGuest := strings.CutPrefix(name, "guest:"); isGuest {
			rows = append(rows, row{"  in the guest: " + guest, ms + " ms after its kernel's start"})
		} else {
			rows = append(rows, row{name, ms + " ms"})
		}
	}
	return rows
}

// indented passes lines on, indented below the stage that they belong to.
type indented struct {
	out     io.Writer
	midLine bool
}

func (i *indented) Write(p []byte) (int, error) {
	var b bytes.Buffer
	for line := range bytes.Lines(p) {
		if !i.midLine {
			b.WriteString("    | ")
		}
		b.Write(line)
		i.midLine = !bytes.HasSuffix(line, []byte{'\n'})
	}
	_, err := i.out.Write(b.Bytes())
	return len(p), err
}
