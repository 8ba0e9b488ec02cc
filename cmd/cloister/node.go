// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

// nodeFlags say which configuration and which platform a command is about.
type nodeFlags struct {
	config string
	tee    string
	json   bool
}

func (f *nodeFlags) add(cmd *cobra.Command, teeHelp string) {
	cmd.Flags().StringVar(&f.config, "config", "", "configuration file (default: as the shim: "+configs.DefaultPath+", else built in)")
	cmd.Flags().StringVar(&f.tee, "tee", "", teeHelp)
	cmd.Flags().BoolVar(&f.json, "json", false, "print JSON")
}

// checkName refuses a platform that does not exist. An empty name is the configured one's.
func checkName(name string) error {
	if name != "" && !slices.Contains(tee.Names(), tee.Name(name)) {
		return usage("--tee %q is not a platform; known are %s", name, abi.KnownPlatforms())
	}
	return nil
}

// load returns the configuration as a handler with that platform has it.
func (f *nodeFlags) load() (*configs.Config, error) {
	if err := checkName(f.tee); err != nil {
		return nil, err
	}
	cfg, err := configs.Load(f.config)
	if err != nil || f.tee == "" {
		return cfg, err
	}
	if cfg, err = cfg.WithPlatform(f.tee); err != nil {
		return nil, err
	}
	return cfg, nil
}

// readPod reads the manifest that a command is about: of the file, of standard input for "-", and without a file of a pod
// that asks for nothing.
func readPod(path string, stdin io.Reader) (*manifest.Pod, error) {
	if path == "" {
		return manifest.Example(), nil
	}
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	p, err := manifest.Read(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// plural is for people.
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
