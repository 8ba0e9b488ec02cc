// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/internal/procid"
)

func TestExit(t *testing.T) {
	dir := t.TempDir()
	_, err := ReadExit(dir)
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	want := Exit{PID: 7, Status: 42, At: time.Unix(1700000000, 5).UTC()}
	require.NoError(t, WriteExit(dir, Exit{Status: 1}))
	require.NoError(t, WriteExit(dir, want))
	got, err := ReadExit(dir)
	require.NoError(t, err)
	require.Equal(t, want, got)

	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "no temporary file is left")
}

func TestOptions(t *testing.T) {
	dir := t.TempDir()
	got, err := ReadOptions(dir)
	require.NoError(t, err)
	require.Nil(t, got)

	want := &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: []byte{1, 2}}
	require.NoError(t, WriteOptions(dir, want))
	got, err = ReadOptions(dir)
	require.NoError(t, err)
	require.True(t, proto.Equal(want, got))

	require.NoError(t, WriteOptions(dir, nil))
	got, err = ReadOptions(dir)
	require.NoError(t, err)
	require.Nil(t, got)
}

func TestAnnotations(t *testing.T) {
	dir := t.TempDir()
	got, err := Annotations(dir)
	require.NoError(t, err, "a sandbox of sandboxer=shim has no config.json")
	require.Empty(t, got)

	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"annotations":{"a":"b"}}`), 0o600))
	got, err = Annotations(dir)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"a": "b"}, got)

	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{`), 0o600))
	_, err = Annotations(dir)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = Spec(dir)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestReadLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	require.NoError(t, os.WriteFile(path, make([]byte, 11), 0o600))
	_, err := readFile(path, 10)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = readFile(path, 11)
	require.NoError(t, err)
}

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	return cmd
}

func TestEndShimKills(t *testing.T) {
	dir := t.TempDir()
	cmd := sleeper(t)
	socket := filepath.Join(dir, "socket")
	require.NoError(t, os.WriteFile(socket, nil, 0o600))
	require.NoError(t, WriteShim(dir, cmd.Process.Pid, "unix://"+socket, "unix:///does/not/exist"))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	require.NoError(t, EndShim(t.Context(), dir, 10*time.Millisecond))
	require.ErrorContains(t, <-ended, "killed")
	require.NoFileExists(t, socket)
	require.NoError(t, EndShim(t.Context(), dir, 0), "repeatable")
}

func TestEndShimWaits(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "read x; exit 3")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	require.NoError(t, WriteShim(dir, cmd.Process.Pid))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	require.NoError(t, in.Close())
	require.NoError(t, EndShim(t.Context(), dir, 10*time.Second))
	require.ErrorContains(t, <-ended, "exit status 3")
}

func TestEndShimOfAnother(t *testing.T) {
	dir := t.TempDir()
	cmd := sleeper(t)
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	ref, err := procid.Of(cmd.Process.Pid)
	require.NoError(t, err)
	// The pid was used again by another process.
	text := fmt.Sprintf(`{"pid":%d,"startTime":%d}`, ref.PID, ref.Start-1)
	require.NoError(t, os.WriteFile(filepath.Join(dir, shimFile), []byte(text), 0o600))
	require.NoError(t, EndShim(t.Context(), dir, 0))
	require.NoError(t, cmd.Process.Signal(syscall.Signal(0)), "still there")

	require.NoError(t, WriteShim(dir, cmd.Process.Pid))
	written, err := os.ReadFile(filepath.Join(dir, shimFile))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf(`{"pid":%d,"startTime":%d}`, ref.PID, ref.Start), string(written), "as every release writes it")
	require.NoError(t, ForgetShim(dir))
	require.NoError(t, ForgetShim(dir))
	require.NoError(t, EndShim(t.Context(), dir, 0))
	require.NoError(t, cmd.Process.Signal(syscall.Signal(0)))
}
