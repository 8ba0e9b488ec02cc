// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"os"
	"time"
)

// TB is what of testing.TB the harness uses; the main job links this package too, and shall not link testing.
type TB interface {
	Helper()
	Cleanup(func())
	Failed() bool
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Skipf(format string, args ...any)
	Context() context.Context
}

// ForTest starts a node for one test and stops it at the test's end. At the end, too, it reports leaks; what the test
// made must have been removed by then. containerd's log is quoted if the test failed. Busybox and the pause image are
// imported. The test is skipped if it does not run as root, and, unless CLOISTER_E2E=required is set (as `make test`
// does), if the machine is not set up.
func ForTest(t TB, opts Options) *Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skipf("needs root")
	}
	if opts.Artifacts == (Artifacts{}) {
		a, err := Locate()
		if err == nil {
			err = a.Check(opts.Handlers...)
		}
		if err != nil && os.Getenv("CLOISTER_E2E") != "required" {
			t.Skipf("cannot run here: %v", err)
		}
		if err != nil {
			t.Fatalf("%v", err)
		}
		opts.Artifacts = a
	}
	n, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatalf("starting a node: %v", err)
	}
	t.Cleanup(func() {
		// The test's context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		leaks, err := n.Leaks(ctx)
		if err != nil {
			t.Errorf("looking for leaks: %v", err)
		}
		for _, leak := range leaks {
			t.Errorf("left behind: %s", leak)
		}
		if t.Failed() {
			t.Logf("the end of containerd's log:\n%s", n.LogTail(80))
		}
		if err := n.Stop(ctx); err != nil {
			t.Errorf("%v", err)
		}
	})
	if err := n.ImportBasics(t.Context()); err != nil {
		t.Fatalf("importing images: %v", err)
	}
	return n
}

// ImportBasics imports [Busybox] as [BusyboxImage], and [Pause].
func (n *Node) ImportBasics(ctx context.Context) error {
	busybox, err := Busybox(BusyboxImage, n.artifacts.Busybox)
	if err != nil {
		return err
	}
	pause, err := Pause(n.artifacts.Busybox)
	if err != nil {
		return err
	}
	return n.Import(ctx, busybox, pause)
}
