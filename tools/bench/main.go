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
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cloister-project/cloister/test/harness"
)

const (
	// stopBudget is how long undoing everything may take, whatever went wrong before.
	stopBudget = 2 * time.Minute
	// stepBudget is for a single pod or container: generous, since emulation on a loaded machine is slow.
	stepBudget = 3 * time.Minute
)

// plan says how much is measured.
type plan struct {
	// Rounds of starting a pod; of reading and of streaming.
	Rounds int `json:"rounds"`
	// Execs of `true`, Containers in one pod, Pods at once.
	Execs      int `json:"execs"`
	Containers int `json:"containers"`
	Pods       int `json:"pods"`
	// StreamMiB go through a stream, and come from a disk, in one sample.
	StreamMiB int `json:"stream_mib"`
	ReadMiB   int `json:"read_mib"`
	// RoundTrips are in one sample.
	RoundTrips int `json:"round_trips"`
}

// memoryContainers is what the shim's memory budget is stated for.
const memoryContainers = 5

func main() {
	if os.Getpid() == 1 {
		probeMain() // in the probe's guest; does not return
	}
	rounds := flag.Int("rounds", 5, "how often a start of a pod is measured; the rest follows from it")
	quick := flag.Bool("quick", false, "measure little: to see that it works")
	out := flag.String("out", "bin", "directory for bench.json and bench.md")
	only := flag.String("only", "", "measure only the steps whose name has this in it")
	strict := flag.Bool("strict", false, "fail if a budget is not met")
	reads := flag.Bool(timeReadFlag, false, "in a container: read a file and tell how long it took")
	flag.Parse()
	if *reads {
		if err := timeReadMain(flag.Arg(0), flag.Arg(1)); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	p := plan{Rounds: *rounds, Execs: 5 * *rounds, Containers: 8, Pods: 4, StreamMiB: 32, ReadMiB: 16, RoundTrips: 1000}
	if *quick {
		p = plan{Rounds: 2, Execs: 5, Containers: memoryContainers, Pods: 2, StreamMiB: 8, ReadMiB: 8, RoundTrips: 200}
	}
	if p.Rounds < 1 {
		fmt.Fprintln(os.Stderr, "bench: -rounds must be 1 or more")
		os.Exit(2)
	}
	// The vsock device and the driver log; only their problems matter here.
	logrus.SetLevel(logrus.WarnLevel)
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, p, *out, *only, *strict); err != nil {
		fmt.Fprintf(os.Stderr, "\nbench: FAILED: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("bench: ok")
}

// run measures, prints and writes the report. What was measured is reported even if something failed.
func run(ctx context.Context, p plan, out, only string, strict bool) (err error) {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	artifacts, err := harness.Locate()
	if err != nil {
		return err
	}
	b := &bench{plan: p, artifacts: artifacts}
	defer func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopBudget)
		defer cancel()
		err = errors.Join(err, b.close(bounded))
	}()
	started := time.Now()
	if err := b.start(ctx); err != nil {
		return err
	}
	r := &report{Started: started.UTC().Truncate(time.Second), Command: "make bench", Plan: p, Machine: b.machineFacts()}
	for _, step := range []struct {
		name string
		do   func(context.Context) ([]row, error)
	}{
		{"start of a pod", b.measureStart},
		{"containers in a pod, memory, exec", b.measurePod},
		{"streams and disks", b.measureData},
		{"size of the guest image", b.measureSize},
		{"pods at once", b.measurePods},
		{"vsock devices", b.measureVsock},
	} {
		if !strings.Contains(step.name, only) {
			continue
		}
		at := time.Now()
		fmt.Printf("==> %s\n", step.name)
		rows, failure := step.do(ctx)
		r.Rows = append(r.Rows, rows...)
		if failure != nil {
			r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", step.name, failure))
			err = errors.Join(err, fmt.Errorf("%s: %w", step.name, failure))
		}
		fmt.Printf("    %.1f s\n", time.Since(at).Seconds())
		if ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	if err != nil {
		kept := filepath.Join(out, "bench-containerd.log")
		err = errors.Join(err, b.node.CopyLog(kept))
		fmt.Fprintf(os.Stderr, "containerd's log is in %s\n", kept)
	}
	r.Machine.GuestKernel = b.guestKernel
	r.Took = time.Since(started).Round(time.Second).String()
	if werr := r.write(out); werr != nil {
		return errors.Join(err, werr)
	}
	fmt.Println()
	fmt.Print(r.text())
	if missed := r.missed(); strict && len(missed) > 0 {
		err = errors.Join(err, fmt.Errorf("%d budgets are not met: %v", len(missed), missed))
	}
	return err
}
