// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloister-project/cloister/test/harness"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testBudget is how long one test of a Go suite may take; critestBudget all of critest.
const (
	testBudget    = 15 * time.Minute
	critestBudget = 3 * time.Hour
)

// suite is a suite as it is run with a runtime.
type suite struct {
	name string
	// handler is the node's, and containerd's default.
	handler string
	run     func(ctx context.Context, j *job) ([]Result, error)
}

// suites lists the suites for a runtime, nil for one that is not known.
func suites(runtime string) []suite {
	switch runtime {
	case runtimeRunc:
		return []suite{
			{"critest", harness.HandlerRunc, critest},
			{"cri-integration", harness.HandlerRunc, criIntegration},
			{"client", harness.HandlerRunc, clientSuite("io.containerd.runc.v2")},
		}
	case runtimeCloister:
		return []suite{
			{"critest", harness.HandlerCloister, critest},
			{"critest-classic", harness.HandlerClassic, critest},
			{"cri-integration", harness.HandlerCloister, criIntegration},
			{"client", harness.HandlerCloister, clientSuite("io.containerd.cloister.v2")},
		}
	}
	return nil
}

// worker runs suites.
type worker struct {
	artifacts   harness.Artifacts
	out         string
	focus, skip string
}

// job is one run of a suite on a node of its own.
type job struct {
	*worker
	suite suite
	node  *harness.Node
	logs  string
}

// runSuite starts a node for the suite, runs it and ends the node.
func (w *worker) runSuite(ctx context.Context, runtime string, s suite) (_ *Suite, err error) {
	started := time.Now()
	fmt.Printf("==> %s with %s\n", s.name, runtime)
	j := &job{worker: w, suite: s, logs: filepath.Join(w.out, "logs", runtime, s.name)}
	if err := os.RemoveAll(j.logs); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(j.logs, 0o755); err != nil {
		return nil, err
	}
	handlers := []string{s.handler, harness.HandlerRunc}
	if j.node, err = harness.Start(ctx, harness.Options{Artifacts: w.artifacts, Handlers: handlers}); err != nil {
		return nil, err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		err = errors.Join(err, j.node.CopyLog(filepath.Join(j.logs, "containerd.log")), j.node.Stop(end))
	}()
	stopRegistry, err := serveImages(ctx, j.node)
	if err != nil {
		return nil, err
	}
	defer stopRegistry()
	if err := makeImages(ctx, j.node); err != nil {
		return nil, err
	}
	results, err := j.keepingContainerd(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(results, func(a, b Result) int { return strings.Compare(a.Spec, b.Spec) })
	counts := map[State]int{}
	for _, r := range results {
		counts[r.State]++
	}
	took := time.Since(started)
	fmt.Printf("    %d passed, %d failed, %d skipped in %.0f s\n", counts[Passed], counts[Failed], counts[Skipped], took.Seconds())
	return &Suite{Name: s.name, Seconds: took.Seconds(), Results: results}, nil
}

// keepingContainerd runs the suite, and starts containerd again whenever a test has ended it, as a service manager would.
func (j *job) keepingContainerd(ctx context.Context) ([]Result, error) {
	keeping, end := context.WithCancel(ctx)
	var kept sync.WaitGroup
	defer kept.Wait()
	defer end()
	kept.Go(func() {
		for {
			select {
			case <-keeping.Done():
				return
			case <-j.node.ContainerdEnded():
			}
			if err := j.node.StartContainerd(keeping); err != nil {
				if keeping.Err() == nil {
					fmt.Fprintln(os.Stderr, "suites: starting containerd again:", err)
				}
				return
			}
		}
	})
	return j.suite.run(ctx, j)
}

// command prepares a program of a suite in the node's network namespace.
func (j *job) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := j.node.Command(ctx, append([]string{filepath.Join(j.artifacts.Conformance, name)}, args...)...)
	for i, e := range cmd.Env {
		if path, ok := strings.CutPrefix(e, "PATH="); ok {
			cmd.Env[i] = "PATH=" + j.node.Dir + ":" + path
		}
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	return cmd
}

// critest runs the CRI's validation suite.
func critest(ctx context.Context, j *job) ([]Result, error) {
	ctx, cancel := context.WithTimeout(ctx, critestBudget)
	defer cancel()
	socket, report := "unix://"+j.node.Socket, filepath.Join(j.logs, "junit.xml")
	args := []string{
		"-runtime-endpoint", socket, "-image-endpoint", socket, "-config", os.DevNull, "-runtime-handler", j.suite.handler,
		"-ginkgo.junit-report", report, "-ginkgo.no-color", "-ginkgo.seed", "1", "-ginkgo.timeout", critestBudget.String(),
		"-test.timeout", critestBudget.String(),
	}
	if j.focus != "" {
		args = append(args, "-ginkgo.focus", j.focus)
	}
	if j.skip != "" {
		args = append(args, "-ginkgo.skip", j.skip)
	}
	log, err := os.Create(filepath.Join(j.logs, "output.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := j.command(ctx, "critest", args...)
	cmd.Stdout, cmd.Stderr = log, log
	ran := cmd.Run()
	data, err := os.ReadFile(report)
	if err != nil {
		return nil, fmt.Errorf("%w (critest: %w), see %s", err, ran, log.Name())
	}
	return parseJUnit(data)
}

// criIntegration runs containerd's integration suite of its CRI plugin.
func criIntegration(ctx context.Context, j *job) ([]Result, error) {
	digest, err := j.command(ctx, "crane", "digest", "--insecure", registry+"/containerd/busybox:1.36").Output()
	if err != nil {
		return nil, fmt.Errorf("crane digest: %w", err)
	}
	list := filepath.Join(j.node.Dir, "image-list.toml")
	text := fmt.Sprintf("BusyBoxByDigest = 'ghcr.io/containerd/busybox@%s'\n", strings.TrimSpace(string(digest)))
	if err := os.WriteFile(list, []byte(text), 0o644); err != nil {
		return nil, err
	}
	return j.goTests(ctx, "cri-integration", nil,
		"-cri-endpoint", "unix://"+j.node.Socket, "-runtime-handler", j.suite.handler, "-containerd-bin", j.node.ContainerdName(),
		"-build-dir", j.artifacts.Conformance, "-image-list", list)
}

// clientSuite runs containerd's integration suite of its client with a runtime.
func clientSuite(runtime string) func(context.Context, *job) ([]Result, error) {
	return func(ctx context.Context, j *job) ([]Result, error) {
		// The suite pulls by itself, and not by containerd's CRI, which knows the registry.
		authority, stop, err := serveTLS(j.node)
		if err != nil {
			return nil, err
		}
		defer stop()
		return j.goTests(ctx, "client-suite",
			[]string{"TEST_RUNTIME=" + runtime, "TEST_SNAPSHOTTER=overlayfs", "SSL_CERT_FILE=" + authority},
			"-address", j.node.Socket, "-no-daemon", "-no-criu", "-test.root")
	}
}

// goTests runs each test of a Go test binary in a process of its own: one that hangs costs its own time only.
func (j *job) goTests(ctx context.Context, binary string, env []string, args ...string) ([]Result, error) {
	list := j.command(ctx, binary, append([]string{"-test.list", "^Test"}, args...)...)
	list.Env = append(list.Env, env...)
	var complaint bytes.Buffer
	list.Stderr = &complaint
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -test.list: %w: %s", binary, err, complaint.String())
	}
	if !strings.Contains(string(out), "Test") {
		return nil, fmt.Errorf("%s lists no tests: %s%s", binary, out, complaint.String())
	}
	chosen, err := chooser(j.focus, j.skip)
	if err != nil {
		return nil, err
	}
	var results []Result
	for name := range strings.FieldsSeq(string(out)) {
		if !strings.HasPrefix(name, "Test") || !chosen(name) {
			continue
		}
		got, err := j.goTest(ctx, binary, name, env, args)
		if err != nil {
			return nil, err
		}
		results = append(results, got...)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := j.clean(ctx); err != nil {
			fmt.Fprintf(os.Stderr, "suites: cleaning up after %s: %v\n", name, err)
		}
	}
	return results, nil
}

func (j *job) goTest(ctx context.Context, binary, name string, env, args []string) ([]Result, error) {
	limited, cancel := context.WithTimeout(ctx, testBudget+time.Minute)
	defer cancel()
	log, err := os.Create(filepath.Join(j.logs, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := j.command(limited, binary,
		append([]string{"-test.v", "-test.run", "^" + name + "$", "-test.timeout", testBudget.String()}, args...)...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = 10 * time.Second // a process that the test left may hold the log
	ran := cmd.Run()
	output, err := os.ReadFile(log.Name())
	if err != nil {
		return nil, err
	}
	results := parseGo(name, string(output))
	for _, r := range results {
		fmt.Printf("    %-8s %6.1f s  %s\n", r.State, r.Seconds, r.Spec)
	}
	if ran != nil && !slices.ContainsFunc(results, func(r Result) bool { return r.State == Failed }) {
		results = append(results, Result{Spec: name, State: Failed, Reason: cut(ran.Error() + "\n" + string(output))})
	}
	return results, nil
}

// chooser returns what says whether a test of a Go suite runs.
func chooser(focus, skip string) (func(string) bool, error) {
	with, err := regexp.Compile(focus)
	if err != nil {
		return nil, err
	}
	without, err := regexp.Compile(skip)
	if err != nil {
		return nil, err
	}
	return func(name string) bool { return with.MatchString(name) && (skip == "" || !without.MatchString(name)) }, nil
}

// clean removes what a failed test left, so that the next one does not meet it.
func (j *job) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var faults []error
	cri := j.node.CRI().Runtime
	pods, err := cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	faults = append(faults, err)
	for _, p := range pods.GetItems() {
		_, err := cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		faults = append(faults, err)
		_, err = cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		faults = append(faults, err)
	}
	const namespace = "testing" // the client suite's
	ctr := func(args ...string) (string, error) {
		cmd := j.node.Ctr(ctx, append([]string{"-n", namespace}, args...)...)
		var complaint bytes.Buffer // and warnings
		cmd.Stderr = &complaint
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("ctr %v: %w: %s", args, err, complaint.String())
		}
		return string(out), nil
	}
	containers, err := ctr("containers", "list", "-q")
	faults = append(faults, err)
	for id := range strings.FieldsSeq(containers) {
		_, _ = ctr("tasks", "kill", "-s", "KILL", id) // it may have none
		_, _ = ctr("tasks", "delete", "-f", id)
		_, err := ctr("containers", "delete", id)
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}
