// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// DefaultPath is the node's configuration file, used where containerd names none.
const DefaultPath = "/etc/cloister/cloister.toml"

// dropInDir is the directory of drop-ins, beside the file.
const dropInDir = "config.d"

// builtIn is what stands for a file in faults of the embedded defaults.
const builtIn = "built-in defaults"

//go:embed cloister.toml
var base []byte

// Base is the embedded cloister.toml, with its comments: the documentation of all keys and the start of a node's own
// file. The caller owns the copy.
func Base() []byte { return slices.Clone(base) }

// PathVariable is the environment variable that names a file in DefaultPath's place, for callers that cannot pass
// options: nerdctl gives none to a runtime. Whoever sets it starts the shim, and so could start any other program.
const PathVariable = "CLOISTER_CONFIG"

// Load reads the file at path and its drop-ins over the embedded defaults. An empty path is what PathVariable names, or
// where that is not set either, DefaultPath where that
// file exists, and the defaults alone (still with the drop-ins of /etc/cloister/config.d) where it does not; any other
// path must exist. Every fault is reported at once: the error is of type Faults. Load does not look at the files that
// the configuration names, and does not judge what a platform makes of its settings (package tee/platform).
func Load(path string) (*Config, error) {
	return load(cmp.Or(path, os.Getenv(PathVariable)), DefaultPath, nil)
}

// Defaults is the embedded configuration alone, whatever files the node has.
func Defaults() (*Config, error) {
	c := &Config{origins: map[string]origin{}}
	faults := c.mergeAll([]layer{{builtIn, base}})
	if err := faults.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// layer is one TOML document.
type layer struct {
	file string
	data []byte
}

// load is Load with the default path as a parameter for tests, and an extra layer on top (containerd's ConfigBody).
func load(path, defaultPath string, top *layer) (*Config, error) {
	layers := []layer{{builtIn, base}}
	var faults Faults

	optional := path == ""
	if optional {
		path = defaultPath
	}
	data, err := readFile(path)
	switch {
	case err == nil:
		layers = append(layers, layer{path, data})
	case optional && errors.Is(err, fs.ErrNotExist):
	default:
		faults = append(faults, Fault{File: path, Reason: reasonOf(err),
			Fix: "make the file readable, or change ConfigPath in containerd's runtime options"})
	}

	dropIns, fault := listDropIns(filepath.Join(filepath.Dir(path), dropInDir))
	if fault != nil {
		faults = append(faults, *fault)
	}
	for _, p := range dropIns {
		data, err := readFile(p)
		if err != nil {
			faults = append(faults, Fault{File: p, Reason: reasonOf(err), Fix: "make the file readable, or remove it"})
			continue
		}
		layers = append(layers, layer{p, data})
	}
	if top != nil {
		layers = append(layers, *top)
	}

	c := &Config{origins: map[string]origin{}}
	faults = append(faults, c.mergeAll(layers)...)
	if err := faults.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// mergeAll lays documents over c, one after the other.
func (c *Config) mergeAll(layers []layer) (faults Faults) {
	table := make(map[string]setting)
	for _, s := range settings() {
		table[s.key] = s
	}
	for _, l := range layers {
		faults = append(faults, c.merge(table, l)...)
	}
	return append(faults, crossCheck(c)...)
}

// listDropIns names the drop-ins in lexical order. A directory that does not exist has none.
func listDropIns(dir string) ([]string, *Fault) {
	entries, err := os.ReadDir(dir) // sorted by name
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &Fault{File: dir, Reason: reasonOf(err), Fix: "make the directory readable, or remove it"}
	}
	var paths []string
	for _, e := range entries {
		// Hidden files are what editors leave.
		if !strings.HasSuffix(e.Name(), ".toml") || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		paths = append(paths, filepath.Join(dir, e.Name()))
	}
	if len(paths) > maxDropIns {
		return nil, &Fault{File: dir, Reason: fmt.Sprintf("%d drop-ins", len(paths)), Fix: fmt.Sprintf("keep at most %d", maxDropIns)}
	}
	return paths, nil
}

// readFile reads a regular file of bounded size. It looks at the opened file, not at the path, and does not hang on a
// FIFO.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("is larger than %d bytes", maxFileBytes)
	}
	return data, nil
}

// reasonOf leaves out the operation and the path that a PathError repeats.
func reasonOf(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// merge lays one document over c.
func (c *Config) merge(table map[string]setting, l layer) Faults {
	doc := map[string]any{}
	if err := toml.Unmarshal(l.data, &doc); err != nil {
		f := Fault{File: l.file, Reason: "is not TOML: " + strings.TrimPrefix(err.Error(), "toml: "), Fix: "correct the line"}
		var de *toml.DecodeError
		if errors.As(err, &de) {
			f.Line, _ = de.Position()
			f.Key = strings.Join(de.Key(), ".")
		}
		return Faults{f}
	}
	m := merger{c: c, table: table, file: l.file, lines: keyLines(l.data)}
	m.walk("", doc)
	// Map order is random; people read from the top.
	slices.SortStableFunc(m.faults, func(a, b Fault) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return strings.Compare(a.Key, b.Key)
	})
	return m.faults
}

type merger struct {
	c      *Config
	table  map[string]setting
	file   string
	lines  map[string]int
	faults Faults
}

func (m *merger) walk(prefix string, doc map[string]any) {
	for name, raw := range doc {
		key := name
		if prefix != "" {
			key = prefix + "." + name
		}
		if s, ok := m.table[key]; ok && !strings.Contains(name, ".") {
			if p := s.set(m.c, raw); p != nil {
				m.add(key, p.reason, p.fix)
				continue
			}
			m.c.origins[key] = origin{m.file, m.lines[key]}
			continue
		}
		known := m.keysBelow(key)
		sub, isTable := raw.(map[string]any)
		switch {
		case len(known) == 0 || strings.Contains(name, "."):
			m.unknown(prefix, key)
		case !isTable:
			p := wrongType(raw, "a table with some of "+strings.Join(known, ", "))
			m.add(key, p.reason, p.fix)
		default:
			m.walk(key, sub)
		}
	}
}

func (m *merger) unknown(prefix, key string) {
	known := m.keysBelow(prefix)
	where := "the tables are "
	if prefix != "" {
		where = "the keys of [" + prefix + "] are "
	}
	m.add(key, "is not a key that Cloister knows", "correct or remove it; "+where+strings.Join(known, ", "))
}

func (m *merger) add(key, reason, fix string) {
	m.faults = append(m.faults, Fault{File: m.file, Line: m.lines[key], Key: clip(key), Reason: reason, Fix: fix})
}

// keysBelow returns the next parts of all known keys under prefix, sorted; the names of the tables for "".
func (m *merger) keysBelow(prefix string) []string {
	set := map[string]bool{}
	for k := range m.table {
		rest, ok := k, true
		if prefix != "" {
			rest, ok = strings.CutPrefix(k, prefix+".")
		}
		if ok {
			head, _, _ := strings.Cut(rest, ".")
			set[head] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// keyLines maps dotted keys and tables to the lines where they are first written. The document parsed before, so
// errors of this second pass only lose line numbers.
func keyLines(data []byte) map[string]int {
	lines := map[string]int{}
	var p unstable.Parser
	p.Reset(data)

	var record func(prefix string, n *unstable.Node) string
	record = func(prefix string, n *unstable.Node) string {
		key, line := prefix, 0
		for it := n.Key(); it.Next(); {
			part := it.Node()
			if line == 0 {
				line = p.Shape(part.Raw).Start.Line
			}
			if key != "" {
				key += "."
			}
			key += string(part.Data)
			if _, ok := lines[key]; !ok {
				lines[key] = line
			}
		}
		if n.Kind == unstable.KeyValue && n.Value().Kind == unstable.InlineTable {
			for it := n.Value().Children(); it.Next(); {
				record(key, it.Node())
			}
		}
		return key
	}

	table := ""
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = record("", e)
		case unstable.KeyValue:
			record(table, e)
		}
	}
	return lines
}
