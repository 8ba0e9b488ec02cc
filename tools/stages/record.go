// SPDX-License-Identifier: Apache-2.0

package stages

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"
)

// Record is what was done, and the time that all of it took.
type Record struct {
	Stages []Stage       `json:"stages"`
	Wall   time.Duration `json:"wallNanoseconds"`
}

// Stage is one that has ended.
type Stage struct {
	Name   string        `json:"name"`
	Result string        `json:"result,omitempty"`
	Took   time.Duration `json:"tookNanoseconds"`
	// Background stages ran beside others: the times of all do not add up.
	Background bool `json:"background,omitempty"`
}

// Read reads a record that Write has written.
func Read(path string) (Record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Record{}, err
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("reading %s: %w", path, err)
	}
	return r, nil
}

// Write writes a record for another program.
func (r Record) Write(path string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}

// Table shows all stages with their times.
func (r Record) Table(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STAGE\tTIME\tRESULT")
	for _, s := range r.Stages {
		result := s.Result
		if s.Background {
			result = "in the background"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, seconds(s.Took), result)
	}
	fmt.Fprintf(w, "all\t%s\t\n", seconds(r.Wall))
	return w.Flush()
}
