// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// State is what became of a spec.
type State string

// The states of a spec.
const (
	Passed  State = "passed"
	Failed  State = "failed"
	Skipped State = "skipped"
)

// Result is what a suite says about one of its specs.
type Result struct {
	Spec    string  `json:"spec"`
	State   State   `json:"state"`
	Seconds float64 `json:"seconds"`
	// Reason is the end of what a failed or skipped spec printed.
	Reason string `json:"reason,omitempty"`
}

// Suite is one run of a suite.
type Suite struct {
	Name    string   `json:"name"`
	Seconds float64  `json:"seconds"`
	Results []Result `json:"results"`
}

// Report is one run of all suites with a runtime.
type Report struct {
	Runtime string `json:"runtime"`
	Date    string `json:"date"`
	// Focus is what was chosen of the suites; empty: all.
	Focus    string            `json:"focus,omitempty"`
	Versions map[string]string `json:"versions"`
	Suites   []Suite           `json:"suites"`
}

func (r *Report) write(dir string) error {
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, r.Runtime+".json"), append(data, '\n'), 0o644)
}

// readReport returns nil without an error when there is none.
func readReport(dir, runtime string) (*Report, error) {
	data, err := os.ReadFile(filepath.Join(dir, runtime+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &Report{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s.json: %w", runtime, err)
	}
	return r, nil
}

// junit is what of JUnit's XML ginkgo writes and is read here.
type junit struct {
	Suites []struct {
		Cases []struct {
			Name    string  `xml:"name,attr"`
			Status  string  `xml:"status,attr"`
			Time    float64 `xml:"time,attr"`
			Failure *struct {
				Message string `xml:"message,attr"`
				Text    string `xml:",chardata"`
			} `xml:"failure"`
			Error *struct {
				Message string `xml:"message,attr"`
			} `xml:"error"`
			Skipped *struct {
				Message string `xml:"message,attr"`
			} `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// parseJUnit reads a report of ginkgo's. Specs that were not selected, and the nodes around the specs that passed, are left out.
func parseJUnit(data []byte) ([]Result, error) {
	var doc junit
	if err := xml.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	var results []Result
	for _, s := range doc.Suites {
		for _, c := range s.Cases {
			name, spec := strings.CutPrefix(c.Name, "[It] ")
			r := Result{Spec: name, Seconds: c.Time}
			switch c.Status {
			case "passed":
				r.State = Passed
			case "skipped", "pending":
				r.State = Skipped
				if c.Skipped == nil || c.Skipped.Message == "skipped" || c.Skipped.Message == "" {
					continue
				}
				r.Reason = cut(strings.TrimPrefix(c.Skipped.Message, "skipped - "))
			default:
				r.State = Failed
				if c.Failure != nil {
					r.Reason = cut(c.Failure.Message + "\n" + c.Failure.Text)
				} else if c.Error != nil {
					r.Reason = cut(c.Error.Message)
				}
			}
			if spec || r.State == Failed {
				results = append(results, r)
			}
		}
	}
	return results, nil
}

var goResult = regexp.MustCompile(`^[\x16\s]*--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+)s\)`)

// parseGo reads what a Go test binary with -test.v printed when it ran the test named top: the results of its subtests,
// or its own if it has none or failed beside them. One that says nothing (it was killed, or panicked) has failed.
func parseGo(top, output string) []Result {
	var results []Result
	states := map[string]State{"PASS": Passed, "FAIL": Failed, "SKIP": Skipped}
	reason := cut(interesting(output))
	for line := range strings.Lines(output) {
		if m := goResult.FindStringSubmatch(line); m != nil {
			r := Result{Spec: m[2], State: states[m[1]]}
			r.Seconds, _ = strconv.ParseFloat(m[3], 64) // the expression has seen it
			if r.State != Passed {
				r.Reason = reason
			}
			results = append(results, r)
		}
	}
	if !slices.ContainsFunc(results, func(r Result) bool { return r.Spec == top }) {
		results = append(results, Result{Spec: top, State: Failed, Reason: reason})
	}
	all := slices.Clone(results)
	return slices.DeleteFunc(results, func(r Result) bool {
		children := false
		for _, other := range all {
			if strings.HasPrefix(other.Spec, r.Spec+"/") {
				children = true
				if r.State == Failed && other.State == Failed {
					return true
				}
			}
		}
		return children && r.State != Failed
	})
}

// interesting leaves out the log lines that tests pass on from containerd's client.
func interesting(output string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		if !strings.Contains(line, "level=") && !strings.Contains(line, `"level":`) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// cut keeps the end of a text, which says why.
func cut(text string) string {
	const most = 1500
	text = strings.TrimSpace(text)
	if len(text) > most {
		text = "…" + strings.ToValidUTF8(text[len(text)-most:], "")
	}
	return text
}

func today() string { return time.Now().UTC().Format(time.DateOnly) }
