// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// program writes a shell script that is started as a logging program.
func program(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "logger")
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700))
	return path
}

func TestLogger(t *testing.T) {
	dir := t.TempDir()
	path := program(t, `printf '%s %s %s %s' "$CONTAINER_ID" "$CONTAINER_NAMESPACE" "$1" "$2" > `+dir+`/id
printf r >&5
exec 5>&-
cat <&3 > `+dir+`/out
cat <&4 > `+dir+`/err
echo end > `+dir+`/end
`)
	uri := "binary-v2://" + path + "?--flag=a%20b"
	r := open(t, Config{Namespace: "k8s.io", ID: "c1", Stdout: uri, Stderr: uri})
	stdout, out := stream(t)
	stderr, errs := stream(t)
	r.Attach(nil, stdout, stderr)
	_, err := out.Write([]byte("to stdout"))
	require.NoError(t, err)
	_, err = errs.Write([]byte("to stderr"))
	require.NoError(t, err)
	require.NoError(t, out.Close())
	require.NoError(t, errs.Close())
	r.Drain(soon(t), 9, 9)
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(dir, "end"))
		return err == nil
	}, 10*time.Second, time.Millisecond, "the program ends by itself")
	for name, want := range map[string]string{"id": "c1 k8s.io --flag a b", "out": "to stdout", "err": "to stderr"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
}

func TestLoggerThatIsNotReady(t *testing.T) {
	_, err := Open(t.Context(), Config{Stdout: "binary-v2://" + program(t, "exit 0\n")})
	require.ErrorContains(t, err, "before it said that it is ready")

	// Version 1 says it by closing the pipe, which its end does as well.
	r, err := Open(t.Context(), Config{Stdout: "binary://" + program(t, "exit 0\n")})
	require.NoError(t, err)
	require.NoError(t, r.Close())

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = Open(ctx, Config{Stdout: "binary://" + program(t, "exec sleep 60\n")})
	require.ErrorIs(t, err, context.DeadlineExceeded)
}
