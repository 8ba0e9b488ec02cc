// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// pollConsole is how often the console's log is looked at.
const pollConsole = 5 * time.Millisecond

// VM is a VM of a test.
type VM struct {
	hypervisor.VM
	StateDir string
}

// StateDir makes a state directory for a VM. Its path is short whatever the test is called: there are sockets in it.
func StateDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// Start starts a VM without booting it; res needs no state directory. When the test ends the VM is killed, and must have left
// nothing but its logs.
func Start(t testing.TB, d hypervisor.Driver, doc hypervisor.Document, res hypervisor.Resources) *VM {
	t.Helper()
	if res.StateDir == "" {
		res.StateDir = StateDir(t)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	h, err := d.Start(ctx, doc, res)
	require.NoError(t, err)
	v := &VM{VM: h, StateDir: res.StateDir}
	t.Cleanup(func() {
		v.Kill()
		require.NoDirExists(t, fmt.Sprintf("/proc/%d", v.PID()))
		require.Empty(t, v.left(t))
		if t.Failed() {
			t.Log(v.Exit())
		}
	})
	return v
}

// left returns the names of what is in the state directory beside the logs.
func (v *VM) left(t testing.TB) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(v.StateDir)
	require.NoError(t, err)
	for _, e := range entries {
		switch name := strings.TrimSuffix(e.Name(), ".1"); name {
		case supervise.ConsoleLog, supervise.VMMLog:
		default:
			names = append(names, e.Name())
		}
	}
	return names
}

// Boot starts a VM and waits for its init.
func Boot(t testing.TB, d hypervisor.Driver, doc hypervisor.Document) *VM {
	t.Helper()
	v := Start(t, d, doc, hypervisor.Resources{})
	require.NoError(t, v.Boot(context.Background()))
	v.WaitConsole(t, "INIT up")
	return v
}

// WaitConsole waits for a text on the console, and returns its line from there on.
func (v *VM) WaitConsole(t testing.TB, text string) string {
	t.Helper()
	return v.WaitConsoleAfter(t, "", text)
}

// WaitConsoleAfter waits for a text on the console after another one.
func (v *VM) WaitConsoleAfter(t testing.TB, mark, text string) string {
	t.Helper()
	f, err := os.Open(filepath.Join(v.StateDir, supervise.ConsoleLog))
	require.NoError(t, err)
	defer f.Close()
	poll := time.NewTicker(pollConsole)
	defer poll.Stop()
	timeout := time.NewTimer(Timeout)
	defer timeout.Stop()
	all := ""
	for ended := false; ; {
		more, err := io.ReadAll(f)
		require.NoError(t, err)
		all += string(more)
		if i := strings.LastIndex(all, text); i >= 0 && (mark == "" || i > strings.LastIndex(all, mark)) {
			if line, _, whole := strings.Cut(all[i:], "\n"); whole {
				return strings.TrimSpace(line)
			}
		}
		if ended {
			require.FailNow(t, "the VM ended", "waiting for %q: %v", text, v.Exit())
		}
		select {
		case <-poll.C:
		case <-v.Done(): // the log is complete
			ended = true
		case <-timeout.C:
			require.FailNow(t, "timeout", "waiting for %q on the console:\n%s", text, all)
		}
	}
}

// WaitEnd waits for the VM's end.
func (v *VM) WaitEnd(t testing.TB) hypervisor.Exit {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(Timeout):
		require.FailNow(t, "the VM did not end")
	}
	return v.Exit()
}

// Greet listens for the greeting that the init of "devices" sends over vsock, and answers with "hello". The greeting comes out of
// the channel, or what went wrong.
func (v *VM) Greet(t testing.TB) <-chan string {
	t.Helper()
	l, err := v.Vsock().Listen(1024)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	heard := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			heard <- err.Error()
			return
		}
		defer conn.Close()
		words := make([]byte, 64)
		n, _ := conn.Read(words)
		_, _ = conn.Write([]byte("hello"))
		heard <- string(words[:n])
		_, _ = conn.Read(words) // until the guest has the answer and closes
	}()
	return heard
}
