// SPDX-License-Identifier: Apache-2.0

package archtest

import (
	"bufio"
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/cloister-project/cloister/"

// allowed lists what the packages of each top-level directory may import of the others (docs/architecture.md), a package
// or, with "/...", everything below it. Within a directory imports are free, but for cycles.
var allowed = map[string][]string{
	"agent-protocol": {},
	"internal":       {},
	"configs":        {"tee/abi", "agent-protocol/wire"},
	"hypervisor":     {"tee/abi", "internal/..."},
	"tee":            {"hypervisor", "configs", "agent-protocol/...", "internal/..."},
	// One VMM and one platform are known to their factories alone.
	"virtcontainers": {
		"hypervisor", "hypervisor/vmm", "hypervisor/vsock", "hypervisor/pvh", "tee", "tee/abi", "tee/initdata", "tee/platform",
		"agent-protocol/...", "configs", "internal/...",
	},
	"shim":  {"virtcontainers/...", "hypervisor", "hypervisor/vsock", "agent-protocol/...", "configs", "internal/..."},
	"agent": {"agent-protocol/...", "tee/abi", "tee/initdata", "tee/report", "internal/..."},
}

// packages have rules of their own in their directory's place: commands are held to one side of the trust boundary, and what
// both sides import is a leaf.
var packages = map[string][]string{
	"tee/abi":                         {},
	"tee/initdata":                    {},
	"tee/report":                      {"tee/abi"},
	"cmd/cloister-agent":              {"agent/...", "tee/abi", "tee/report", "agent-protocol/...", "internal/..."},
	"cmd/containerd-shim-cloister-v2": {"shim/...", "configs", "internal/..."},
}

func TestImportsPointOneWay(t *testing.T) {
	out, err := exec.Command("go", "list", "-e", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "../../...").Output()
	require.NoError(t, err)
	seen := 0
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		directory, _, _ := strings.Cut(pkg, "/")
		may, own := packages[pkg]
		if !own {
			var ok bool
			if may, ok = allowed[directory]; !ok {
				continue
			}
		}
		seen++
		for _, imported := range fields[1:] {
			imported, ours := strings.CutPrefix(imported, module)
			if other, _, _ := strings.Cut(imported, "/"); !ours || other == directory && !own {
				continue
			}
			if !slices.ContainsFunc(may, func(m string) bool { return matches(m, imported) }) {
				t.Errorf("%s must not import %s", pkg, imported)
			}
		}
	}
	require.Greater(t, seen, 10, "the list of packages is too short for the test to mean anything")
}

// matches reports whether a package is the one that an entry names, or is below it.
func matches(entry, pkg string) bool {
	if below, ok := strings.CutSuffix(entry, "/..."); ok {
		return pkg == below || strings.HasPrefix(pkg, below+"/")
	}
	return pkg == entry
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	const format = `{{if .GoFiles}}{{.ImportPath}} {{.Name}} {{join .GoFiles ","}} {{.Doc}}{{end}}`
	out, err := exec.Command("go", "list", "-e", "-f", format, "../../...").Output()
	require.NoError(t, err)
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) == 3 {
			t.Errorf("%s has no package comment", fields[0])
		}
		if name, files := fields[1], strings.Split(fields[2], ","); name != "main" && !slices.Contains(files, "doc.go") {
			t.Errorf("%s has no doc.go", fields[0])
		}
	}
}

// maxLines is the longest that a file of code may be; tests and generated files are not counted.
const maxLines = 500

func TestFilesStayShort(t *testing.T) {
	root := filepath.Join("..", "..")
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		lines := 0
		for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
			lines++
		}
		if lines > maxLines {
			t.Errorf("%s has %d lines; split it (the limit is %d)", path, lines, maxLines)
		}
		return nil
	}))
}
