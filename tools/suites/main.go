// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/test/harness"
	"golang.org/x/sys/unix"
)

// Runtimes that the suites run with.
const (
	runtimeCloister = "cloister"
	runtimeRunc     = "runc"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "suites:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	runtimes := flag.String("runtime", "runc,cloister", "what to run the suites with, in this order")
	names := flag.String("suites", "", "which suites, by their names; empty: all")
	focus := flag.String("focus", "", "regular expression of the specs to run; empty: all")
	skip := flag.String("skip", "", "regular expression of the specs to leave out")
	out := flag.String("out", "bin/conformance", "directory for results and logs")
	docs := flag.Bool("docs", false, "write the table into docs/conformance.md; it has to be a run of everything")
	table := flag.Bool("table", false, "run nothing, make the table of the results that are there")
	flag.Parse()
	if !*table {
		if err := enterMountNamespace(); err != nil {
			return err
		}
	}

	artifacts, err := harness.Locate()
	if err != nil {
		return err
	}
	if !filepath.IsAbs(*out) {
		*out = filepath.Join(artifacts.Repository, *out)
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
	}
	var chosen []string
	if *names != "" {
		chosen = strings.Split(*names, ",")
	}
	w := &worker{artifacts: artifacts, out: *out, focus: *focus, skip: *skip}
	if !*table {
		for _, rt := range strings.Split(*runtimes, ",") {
			if err := w.runAll(ctx, rt, chosen); err != nil {
				return err
			}
		}
	}
	baseline, err := readReport(*out, runtimeRunc)
	if err != nil {
		return err
	}
	ours, err := readReport(*out, runtimeCloister)
	if err != nil {
		return err
	}
	if baseline == nil || ours == nil {
		fmt.Println("suites: no table: there are results of one runtime only")
		return nil
	}
	limits, err := readLimits(filepath.Join(artifacts.Repository, "docs", "limits.md"))
	if err != nil {
		return err
	}
	c := compare(baseline, ours, limits)
	fmt.Print(c.text())
	if *docs {
		if err := writeDocs(filepath.Join(artifacts.Repository, "docs", "conformance.md"), c); err != nil {
			return err
		}
	}
	return c.fault()
}

// enterMountNamespace starts the program anew in a mount namespace of its own whose root is shared, as a node's root is
// that systemd has started, since specs about mount propagation ask for that, where registryNames are of the loopback
// device, and where /run/containerd, which the client suite writes to, is its own. Of the machine's nothing is changed, but that it has an
// empty /run/containerd afterwards.
func enterMountNamespace() error {
	const inside = "CLOISTER_SUITES_MOUNT_NAMESPACE"
	if os.Getenv(inside) != "" {
		return nil
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	hosts, err := os.CreateTemp("", "cloister-suites-hosts-")
	if err != nil {
		return err
	}
	defer hosts.Close()
	if _, err := fmt.Fprintf(hosts, "127.0.0.1 localhost %s\n", strings.Join(registryNames, " ")); err != nil {
		return err
	}
	const script = `hosts=$1; shift
mount --make-rshared / && mount --bind "$hosts" /etc/hosts &&
mkdir -p -m 711 /run/containerd && mount -t tmpfs -o mode=711 tmpfs /run/containerd; made=$?
rm "$hosts" && [ $made = 0 ] && exec "$@"`
	line := append([]string{unshare, "--mount", "--propagation", "slave", "--", "sh", "-c", script, "sh", hosts.Name(), self}, os.Args[1:]...)
	return unix.Exec(unshare, line, append(os.Environ(), inside+"=yes"))
}

// runAll runs suites with one runtime and adds their results to the report that is there.
func (w *worker) runAll(ctx context.Context, runtime string, chosen []string) error {
	list := suites(runtime)
	if list == nil {
		return fmt.Errorf("no such runtime: %s; there are %s and %s", runtime, runtimeRunc, runtimeCloister)
	}
	report, err := readReport(w.out, runtime)
	if err != nil {
		return err
	}
	if report == nil || report.Focus != w.focus {
		report = &Report{Runtime: runtime, Focus: w.focus}
	}
	report.Date = today()
	report.Versions = w.versions(ctx)
	for _, s := range list {
		if chosen != nil && !slices.Contains(chosen, s.name) {
			continue
		}
		result, err := w.runSuite(ctx, runtime, s)
		if err != nil {
			return fmt.Errorf("%s with %s: %w", s.name, runtime, err)
		}
		report.Suites = slices.DeleteFunc(report.Suites, func(old Suite) bool { return old.Name == s.name })
		report.Suites = append(report.Suites, *result)
		if err := report.write(w.out); err != nil {
			return err
		}
	}
	return nil
}

// versions are those of what the suites ran on.
func (w *worker) versions(ctx context.Context) map[string]string {
	versions := map[string]string{}
	for name, line := range map[string][]string{
		"containerd": {filepath.Join(w.artifacts.Conformance, "containerd"), "--version"},
		"runc":       {filepath.Join(w.artifacts.Conformance, "runc"), "--version"},
		"QEMU":       {w.artifacts.QEMU, "--version"},
		"cri-tools":  {filepath.Join(w.artifacts.Conformance, "crictl"), "--version"},
	} {
		out, err := exec.CommandContext(ctx, line[0], line[1:]...).Output()
		first, _, _ := strings.Cut(string(out), "\n")
		if err != nil {
			first = "unknown: " + err.Error()
		}
		versions[name] = strings.TrimSpace(first)
	}
	return versions
}
