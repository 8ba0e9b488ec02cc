// SPDX-License-Identifier: Apache-2.0

// Command cloister-agent is PID 1 of a guest: it boots the guest and serves the pod that the host asks for.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/cloister-project/cloister/agent/boot"
	"github.com/cloister-project/cloister/agent/container"
	"github.com/cloister-project/cloister/agent/launch"
	"github.com/cloister-project/cloister/agent/network"
	"github.com/cloister-project/cloister/agent/server"
	"github.com/cloister-project/cloister/agent/storage"
	"github.com/cloister-project/cloister/internal/version"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/report"
)

// Directories of the guest, on tmpfs.
const (
	storageDir = "/run/cloister/storage"
	stateDir   = "/run/cloister/state"
)

// initdataFile is the document that the launch is bound to, for whoever in the guest needs it.
const initdataFile = "/run/cloister/initdata/initdata.toml"

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
	launched, launchErr := system.Launch()
	if err := setLogging(launched.Debug); err != nil {
		return err
	}
	config := server.Config{
		System:    system,
		Network:   network.Apply,
		Transport: server.Vsock(),
		StateDir:  stateDir,
		Version:   version.Version,
		Platform:  string(launched.Platform),
	}
	if err := checkLaunch(ctx, system, &config, launched, launchErr); err != nil {
		// On the console, where the shim finds it if it cannot be told otherwise.
		fmt.Fprintln(os.Stderr, "cloister-agent: cannot go on:", err)
		if err := server.New(config).Refuse(ctx, err); err != nil {
			fmt.Fprintln(os.Stderr, "cloister-agent:", err)
		}
		system.PowerOff()
	}
	store, err := storage.New(storageDir)
	if err != nil {
		return fmt.Errorf("set up storage: %w", err)
	}
	store.After(system.WaitModules)
	store.Confidential(string(launched.Platform))
	config.Storage = store

	s := server.New(config)
	served, end := context.WithCancelCause(ctx)
	go func() { end(fmt.Errorf("serve the host: %w", errors.Join(errors.New("the server ended"), s.Run(ctx)))) }()
	if err := system.Reaper().Run(served); err != nil {
		return fmt.Errorf("reap orphans: %w", err)
	}
	return context.Cause(served)
}

// checkLaunch makes sure that a confidential guest is what its command line says, and keeps its initdata.
func checkLaunch(ctx context.Context, system *boot.System, config *server.Config, l launch.Launch, parseErr error) error {
	if parseErr != nil {
		return parseErr
	}
	if l.Platform == abi.Sample {
		log.G(ctx).Warn("this guest is launched as \"sample\": NO PROTECTION, the host can read its memory")
	}
	if l.Confidential() {
		// They are loaded already, or could not be. A guest without them is not what was measured for.
		if err := system.WaitModules(ctx); err != nil {
			return err
		}
	}
	doc, err := l.Check(ctx, launch.Guest{ReadHardware: report.Hardware{}.Read, OpenDisk: storage.OpenDisk, HasDisk: storage.HasDisk})
	if err != nil || doc == nil {
		return err
	}
	config.Initdata = doc.String()
	if err := os.MkdirAll(filepath.Dir(initdataFile), 0o700); err != nil {
		return fmt.Errorf("keep initdata: %w", err)
	}
	if err := os.WriteFile(initdataFile, doc.Raw, 0o400); err != nil {
		return fmt.Errorf("keep initdata: %w", err)
	}
	return nil
}

// setLogging makes log lines fit for the console, which the host keeps as plain text.
func setLogging(debug bool) error {
	log.L.Logger.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	if debug {
		return log.SetLevel("debug")
	}
	return nil
}
