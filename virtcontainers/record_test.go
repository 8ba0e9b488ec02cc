// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/internal/procid"
)

func writeRecord(t *testing.T, bundle string, r record) {
	t.Helper()
	b, err := json.Marshal(r)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(bundle, recordName), b, 0o600))
}

func TestCleanupEndsTheVMMAndCanBeRepeated(t *testing.T) {
	bundle, state := t.TempDir(), filepath.Join(t.TempDir(), "state")
	require.NoError(t, os.MkdirAll(filepath.Join(state, "sub"), 0o700))
	cmd := exec.Command("sleep", "600")
	require.NoError(t, cmd.Start())
	ref, err := procid.Of(cmd.Process.Pid)
	require.NoError(t, err)
	// As every release has written it.
	text := fmt.Sprintf(`{"id":"x","state_dir":%q,"vmm":{"pid":%d,"start":"%d"}}`, state, ref.PID, ref.Start)
	vmm := processRef(ref)
	b, err := json.Marshal(record{ID: "x", StateDir: state, VMM: &vmm})
	require.NoError(t, err)
	require.Equal(t, text, string(b))
	require.NoError(t, os.WriteFile(filepath.Join(bundle, recordName), []byte(text), 0o600))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	require.NoError(t, Cleanup(ctx, bundle))
	require.ErrorContains(t, <-ended, "killed")
	require.NoDirExists(t, state)
	require.NoFileExists(t, filepath.Join(bundle, recordName))
	require.NoError(t, Cleanup(ctx, bundle))
}

func TestCleanupLeavesAnotherProcessWithThePIDAlone(t *testing.T) {
	bundle := t.TempDir()
	cmd := exec.Command("sleep", "600")
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	writeRecord(t, bundle, record{ID: "x", VMM: &processRef{PID: cmd.Process.Pid, Start: 1}})
	require.NoError(t, Cleanup(context.Background(), bundle))
	require.NoError(t, cmd.Process.Signal(syscall.Signal(0)))
}

func TestCleanupNamesABadRecord(t *testing.T) {
	bundle := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(bundle, recordName), []byte("{"), 0o600))
	require.ErrorContains(t, Cleanup(context.Background(), bundle), recordName)
}
