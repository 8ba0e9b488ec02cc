// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cloister-project/cloister/test/harness"
	"github.com/cloister-project/cloister/tools/stages"
)

// stopBudget is how long undoing everything may take, whatever went wrong before.
const stopBudget = 2 * time.Minute

func main() {
	keep := flag.Bool("keep", false, "leave the pod up at the end")
	prepared := flag.String("prepared", "", "what tools/prepare has done before")
	stop := flag.Bool("stop", false, "stop what was kept, and what killed runs left")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()

	job := func(ctx context.Context) error { return run(ctx, *keep, *prepared) }
	if *stop {
		job = stopAll
	}
	if err := job(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\nmain job: FAILED: %v\n", err)
		os.Exit(1)
	}
	if !*stop {
		fmt.Println("main job: ok")
	}
}

// run does the main job, and shows first what was done before it, if prepared names the record of that.
func run(ctx context.Context, keep bool, prepared string) (err error) {
	var before stages.Record
	if prepared != "" {
		if before, err = stages.Read(prepared); err != nil {
			return err
		}
	}
	handler := harness.HandlerCloister
	if h := os.Getenv("CLOISTER_MAINJOB_HANDLER"); h != "" {
		handler = h
	}
	artifacts, err := harness.Locate()
	if err != nil {
		return err
	}
	j := &job{handler: handler, artifacts: artifacts, report: &report{out: os.Stdout, progress: stages.New(os.Stdout, before)}}
	watched, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	defer unwatch()
	go j.report.progress.Watch(watched)
	defer func() {
		if keep && err == nil {
			err = j.keep()
			return
		}
		err = errors.Join(err, j.end(context.WithoutCancel(ctx), err == nil))
		if err == nil {
			err = j.report.print()
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
	return fmt.Errorf("%w\n\nwarnings and errors of containerd and the shim; all of their log is in %s:\n%s", err, kept,
		j.node.LogProblems(15))
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
