// SPDX-License-Identifier: Apache-2.0

// Command cloister-agent is PID 1 of a guest: it boots the guest and serves the pod that the host asks for.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/cloister-project/cloister/agent/boot"
	"github.com/cloister-project/cloister/agent/container"
	"github.com/cloister-project/cloister/agent/network"
	"github.com/cloister-project/cloister/agent/server"
	"github.com/cloister-project/cloister/agent/storage"
	"github.com/cloister-project/cloister/internal/version"
)

// Folders of the guest, on tmpfs.
const (
	storageDir = "/run/cloister/storage"
	stateDir   = "/run/cloister/state"
)

// The main goroutine stays on the main thread, where the reaper has to run.
func init() { runtime.LockOSThread() }

func main() {
	container.MaybeInit()

	err := run(context.Background())
	// The kernel panics when PID 1 ends. The reason stands right before that on the console, where the shim finds it.
	fmt.Fprintln(os.Stderr, "cloister-agent: cannot go on:", err)
	os.Exit(1)
}

// run boots the guest and starts the server. It returns only when something failed: an orderly end powers the guest off.
func run(ctx context.Context) error {
	system, err := boot.Init(ctx)
	if err != nil {
		return fmt.Errorf("boot the guest: %w", err)
	}
	if err := setLogging(); err != nil {
		return err
	}
	store, err := storage.New(storageDir)
	if err != nil {
		return fmt.Errorf("set up storage: %w", err)
	}
	store.After(system.WaitModules)

	s := server.New(server.Config{
		System:    system,
		Storage:   store,
		Network:   network.Apply,
		Transport: server.Vsock(),
		StateDir:  stateDir,
		Version:   version.Version,
	})
	served, end := context.WithCancelCause(ctx)
	go func() { end(fmt.Errorf("serve the host: %w", errors.Join(errors.New("the server ended"), s.Run(ctx)))) }()
	if err := system.Reaper().Run(served); err != nil {
		return fmt.Errorf("reap orphans: %w", err)
	}
	return context.Cause(served)
}

// debugParameter on the kernel's command line makes the agent tell more; the host sets it with log.debug_console.
const debugParameter = "cloister.debug"

// setLogging makes log lines fit for the console, which the host keeps as plain text.
func setLogging() error {
	log.L.Logger.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(cmdline)), debugParameter) {
		return log.SetLevel("debug")
	}
	return nil
}
