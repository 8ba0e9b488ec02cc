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
	"syscall"
	"time"

	"github.com/cloister-project/cloister/tools/stages"
)

func main() {
	keep := flag.Bool("keep", false, "the pod will be left up: build the tools to look at it, too")
	since := flag.Int64("since", 0, "when building this program began, in milliseconds since 1970")
	flag.Parse()
	if err := run(*keep, *since); err != nil {
		fmt.Fprintf(os.Stderr, "\nmain job: FAILED: %v\n", err)
		os.Exit(1)
	}
}

func run(keep bool, since int64) error {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	var before stages.Record
	if since > 0 {
		took := time.Since(time.UnixMilli(since))
		before = stages.Record{Stages: []stages.Stage{{Name: stepBootstrap, Took: took}}, Wall: took}
	}
	progress := stages.New(os.Stdout, before)
	_, err := os.Stat(filepath.Join("bin", "cloister-agent")) // the last of what is compiled from them
	if err := perform(ctx, progress, plan(os.Getenv("CLOISTER_MAINJOB_HANDLER"), keep, err == nil, haveCertificates())); err != nil {
		return err
	}
	record := filepath.Join("bin", "prepare.json")
	if err := progress.Record().Write(record); err != nil {
		return err
	}
	return becomeMainjob(ctx, record, keep)
}

// haveCertificates reports whether this machine can tell a server by its certificate: Debian's package ca-certificates, which
// the set-up installs, or a file that the user names.
func haveCertificates() bool {
	_, err := os.Stat("/etc/ssl/certs/ca-certificates.crt")
	return err == nil || os.Getenv("SSL_CERT_FILE") != ""
}

// becomeMainjob replaces this process, so that it is the same one that a terminal or make signals.
func becomeMainjob(ctx context.Context, record string, keep bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	program, err := exec.LookPath(filepath.Join("bin", "mainjob"))
	if err != nil {
		return err
	}
	arguments := []string{program, "-prepared", record}
	if keep {
		arguments = append(arguments, "-keep")
	}
	return fmt.Errorf("starting %s: %w", program, syscall.Exec(program, arguments, os.Environ()))
}
