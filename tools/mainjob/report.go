// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/cloister-project/cloister/tools/stages"
)

// report shows progress while stages run and keeps what is shown at the end.
type report struct {
	out      io.Writer
	progress *stages.Progress
	memory   []row
	proof    []comparison
	boot     []row
}

type row struct{ name, value string }

// comparison is one line of the proof: what a container sees beside what the host has.
type comparison struct{ what, inside, host string }

// stage runs one step, named by what it does, and shows its result and time.
func (r *report) stage(ctx context.Context, name string, step func(context.Context) (string, error)) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	running := r.progress.Begin(name, "", false)
	result, err := step(ctx)
	if err != nil {
		running.Fail("")
		return fmt.Errorf("%s: %w", name, err)
	}
	running.End(result)
	return nil
}

// print shows the tables at the end.
func (r *report) print() error {
	r.progress.Println("")
	if err := r.progress.Record().Table(r.out); err != nil {
		return err
	}
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	r.rows(w, "BOOT TIMELINE", r.boot)
	r.rows(w, "MEMORY", r.memory)
	fmt.Fprintf(w, "\nPROOF\tIN THE CONTAINER\tON THE HOST\n")
	for _, c := range r.proof {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.what, c.inside, c.host)
	}
	fmt.Fprintln(w)
	return w.Flush()
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
