// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cloister-project/cloister/test/harness"
)

// stopBudget is how long undoing everything may take, whatever went wrong before.
const stopBudget = 2 * time.Minute

func main() {
	keep := flag.Bool("keep", false, "leave the pod up at the end")
	stop := flag.Bool("stop", false, "stop what was kept, and what killed runs left")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()

	job := run
	if *stop {
		job = func(ctx context.Context, _ bool) error { return stopAll(ctx) }
	}
	if err := job(ctx, *keep); err != nil {
		fmt.Fprintf(os.Stderr, "\nmain job: FAILED: %v\n", err)
		os.Exit(1)
	}
	if !*stop {
		fmt.Println("main job: ok")
	}
}

func run(ctx context.Context, keep bool) (err error) {
	handler := harness.HandlerCloister
	if h := os.Getenv("CLOISTER_MAINJOB_HANDLER"); h != "" {
		handler = h
	}
	j := &job{handler: handler, report: &report{out: os.Stdout}}
	if err := j.prepare(ctx); err != nil {
		return err
	}
	defer func() {
		if keep && err == nil {
			err = j.keep()
			return
		}
		err = errors.Join(err, j.end(context.WithoutCancel(ctx), err == nil))
		if err == nil {
			j.summary()
		}
	}()
	if err := j.start(ctx); err != nil {
		return err
	}
	if err := j.runPod(ctx); err != nil {
		return j.withLog(err)
	}
	if keep {
		return nil
	}
	if err := j.removePod(ctx); err != nil {
		return j.withLog(err)
	}
	return nil
}

// withLog adds to an error what containerd and the shim had to complain about, and keeps the whole of their log beyond
// the node's end.
func (j *job) withLog(err error) error {
	kept := filepath.Join(j.artifacts.Bin, "mainjob-containerd.log")
	if kerr := j.node.CopyLog(kept); kerr != nil {
		return errors.Join(err, kerr)
	}
	return fmt.Errorf("%w\n\nwarnings and errors of containerd and the shim; all of their log is in %s:\n%s", err, kept, j.node.LogProblems(15))
}

func stopAll(ctx context.Context) error {
	nodes, err := harness.Registered()
	if err != nil {
		return err
	}
	if len(nodes) == 0 {
		fmt.Println("nothing is up")
	}
	var faults []error
	for _, n := range nodes {
		fmt.Printf("stopping %s\n", n.Dir)
		bounded, cancel := context.WithTimeout(ctx, stopBudget)
		faults = append(faults, n.Stop(bounded))
		cancel()
	}
	return errors.Join(faults...)
}

// makeTarget runs a target of the Makefile, showing what it prints.
func makeTarget(target string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		cmd := exec.CommandContext(ctx, "make", "--no-print-directory", target)
		// What make told this process by its environment is not for another make.
		for _, e := range os.Environ() {
			if !strings.HasPrefix(e, "MAKEFLAGS=") && !strings.HasPrefix(e, "MAKELEVEL=") && !strings.HasPrefix(e, "MFLAGS=") {
				cmd.Env = append(cmd.Env, e)
			}
		}
		shown := &indented{out: os.Stdout}
		cmd.Stdout, cmd.Stderr = shown, shown
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("make %s: %w; its output is above", target, err)
		}
		return "", nil
	}
}
