// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"slices"
	"strings"
)

// maxQuotedLine bounds a line of the log that is quoted: containerd prints whole specifications.
const maxQuotedLine = 500

func (n *Node) logPath() string { return n.Dir + "/containerd.log" }

// LogTail is the end of containerd's log (its shims' messages included), to be quoted where something failed.
func (n *Node) LogTail(lines int) string {
	return n.quoteLog(lines, func(string) bool { return true })
}

// LogProblems are the last warnings and errors of containerd's log, and what is no log message at all: a panic.
func (n *Node) LogProblems(lines int) string {
	return n.quoteLog(lines, func(line string) bool {
		return !strings.Contains(line, " level=debug ") && !strings.Contains(line, " level=info ") &&
			!strings.Contains(line, "DEPRECATION")
	})
}

// CopyLog copies containerd's log to a file that outlives the node.
func (n *Node) CopyLog(to string) error {
	data, err := os.ReadFile(n.logPath())
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}

func (n *Node) quoteLog(lines int, wanted func(string) bool) string {
	data, err := os.ReadFile(n.logPath())
	if err != nil {
		return err.Error()
	}
	all := slices.DeleteFunc(strings.Split(strings.TrimRight(string(data), "\n"), "\n"), func(l string) bool { return !wanted(l) })
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	for i, line := range all {
		if len(line) > maxQuotedLine {
			all[i] = line[:maxQuotedLine] + "…"
		}
	}
	return strings.Join(all, "\n")
}
