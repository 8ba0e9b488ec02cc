// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/internal/version"
	"github.com/cloister-project/cloister/shim/bootstrap"
	"github.com/cloister-project/cloister/shim/pods"
	"github.com/cloister-project/cloister/virtcontainers"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
)

// invocation is the command line as containerd writes it; the flags are those of containerd/pkg/shim.
type invocation struct {
	understood          bool
	version, info       bool
	debug               bool
	namespace, id       string
	address, publisher  string
	socket, debugSocket string
	bundle, action      string
}

func parse(args []string) invocation {
	var i invocation
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.BoolVar(&i.debug, "debug", false, "")
	f.BoolVar(&i.version, "v", false, "")
	f.BoolVar(&i.version, "version", false, "")
	f.BoolVar(&i.info, "info", false, "")
	f.StringVar(&i.namespace, "namespace", "", "")
	f.StringVar(&i.id, "id", "", "")
	f.StringVar(&i.socket, "socket", "", "")
	f.StringVar(&i.debugSocket, "debug-socket", "", "")
	f.StringVar(&i.bundle, "bundle", "", "")
	f.StringVar(&i.address, "address", "", "")
	f.StringVar(&i.publisher, "publish-binary", "", "")
	i.understood = f.Parse(args) == nil
	i.action = f.Arg(0)
	return i
}

// Main runs the program and returns its exit status. What it does not do itself, containerd/pkg/shim does with the
// command line of the process.
func Main() int { return run(pods.New, virtcontainers.Cleanup) }

// run is Main with pods and their clean-up as parameters for tests.
func run(newPod pods.NewFunc, cleanup func(ctx context.Context, bundle string) error) int {
	ctx := context.Background()
	i := parse(os.Args[1:])
	switch {
	case i.understood && i.version:
		fmt.Printf("%s:\n  Version: %s\n  Runtime: %s\n", os.Args[0], version.String(), bootstrap.Name)
		return 0
	case i.understood && !i.info && i.action == "start":
		return start(ctx, i)
	}
	register(newPod)
	shim.RunShim(ctx, &bootstrap.Manager{Cleanup: cleanup}, func(c *shim.Config) {
		// The hypervisor's driver waits for its own children, and wants no others.
		c.NoReaper = true
		c.NoSubreaper = true
	})
	return 0
}

// start writes nothing but the answer: containerd reads stdout and stderr as one. Only a failure goes to stderr.
func start(ctx context.Context, i invocation) int {
	log.L.Logger.SetOutput(io.Discard)
	dir, err := os.Getwd()
	if err == nil {
		var answer []byte
		answer, err = bootstrap.Start(ctx, bootstrap.Command{
			ID: i.id, Namespace: i.namespace,
			GRPCAddress: i.address, TTRPCAddress: os.Getenv("TTRPC_ADDRESS"), PublishBinary: i.publisher,
			Debug: i.debug, Dir: dir, Env: os.Environ(), Stdin: os.Stdin,
			Capabilities: rootfs.MountCapabilities(),
			MajorVersion: bootstrap.MajorVersion, Launch: bootstrap.Launch, Running: bootstrap.RunningVersion,
		})
		if err == nil {
			_, err = os.Stdout.Write(answer)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", bootstrap.Name, err)
		return 1
	}
	return 0
}
