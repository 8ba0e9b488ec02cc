// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/cloister-project/cloister/test/harness"
)

// stopBudget is how long ending a node and looking for leftovers may take.
const stopBudget = 2 * time.Minute

// shared is the node of all tests that call sharedNode: started by the first, and replaced after a test that failed.
var shared struct {
	mu   sync.Mutex
	node *harness.Node
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.node != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopBudget)
		if err := shared.node.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		cancel()
	}
	os.Exit(code)
}

// sharedNode returns the shared node. Whatever the test makes must be removed when it ends; what is left fails it.
func sharedNode(t *testing.T) *harness.Node {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.node == nil {
		shared.node = startNode(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN")})
	}
	n := shared.node
	t.Cleanup(func() { // runs after the test's own clean-ups, which were added later
		ctx, cancel := context.WithTimeout(context.Background(), stopBudget)
		defer cancel()
		leaks, err := n.Leaks(ctx)
		if err != nil {
			t.Errorf("looking for leaks: %v", err)
		}
		for _, leak := range leaks {
			t.Errorf("left behind: %s", leak)
		}
		if !t.Failed() {
			return
		}
		t.Logf("the end of containerd's log:\n%s", n.LogTail(60))
		shared.mu.Lock()
		defer shared.mu.Unlock()
		shared.node = nil
		if err := n.Stop(ctx); err != nil {
			t.Errorf("%v", err)
		}
	})
	return n
}

// startNode starts a node that outlives the test; whoever calls it stops it. As with harness.ForTest, a machine that is
// not set up skips the test, unless CLOISTER_E2E=required.
func startNode(t *testing.T, opts harness.Options) *harness.Node {
	t.Helper()
	if os.Getuid() != 0 {
		skipLane(t, "needs root")
	}
	artifacts, err := harness.Locate()
	if err == nil {
		err = artifacts.Check(opts.Handlers...)
	}
	if err != nil {
		skipLane(t, err.Error())
	}
	opts.Artifacts = artifacts
	ctx, cancel := context.WithTimeout(t.Context(), stopBudget)
	defer cancel()
	n, err := harness.Start(ctx, opts)
	if err != nil {
		t.Fatalf("starting a node: %v", err)
	}
	if err := n.ImportBasics(ctx); err != nil {
		stopErr := n.Stop(context.WithoutCancel(ctx))
		t.Fatalf("importing images: %v (stopping the node: %v)", err, stopErr)
	}
	return n
}

func skipLane(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CLOISTER_E2E") == "required" {
		t.Fatal(why)
	}
	t.Skip("cannot run here: " + why)
}
