// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/cloister-project/cloister/shim/bundle"
)

func TestStop(t *testing.T) {
	dir := t.TempDir()
	var cleaned []string
	m := &Manager{Cleanup: func(_ context.Context, bundle string) error {
		cleaned = append(cleaned, bundle)
		return nil
	}}
	ctx := context.WithValue(t.Context(), shim.OptsKey{}, shim.Opts{BundlePath: dir})
	before := time.Now()
	status, err := m.Stop(ctx, "c")
	require.NoError(t, err)
	require.Equal(t, 137, status.ExitStatus)
	require.False(t, status.ExitedAt.Before(before))

	at := time.Unix(1700000000, 0).UTC()
	require.NoError(t, bundle.WriteExit(dir, bundle.Exit{PID: 7, Status: 42, At: at}))
	for range 2 {
		status, err = m.Stop(ctx, "c")
		require.NoError(t, err)
		require.Equal(t, shim.StopStatus{Pid: 7, ExitStatus: 42, ExitedAt: at}, status)
	}
	require.Equal(t, []string{dir, dir, dir}, cleaned)

	m.Cleanup = func(context.Context, string) error { return errors.New("a tap is left") }
	_, err = m.Stop(ctx, "c")
	require.ErrorContains(t, err, "a tap is left")
}

func TestStopFindsTheBundle(t *testing.T) {
	parent := t.TempDir()
	t.Chdir(parent)
	var cleaned string
	m := &Manager{Cleanup: func(_ context.Context, bundle string) error {
		cleaned = bundle
		return nil
	}}
	_, err := m.Stop(t.Context(), "c")
	require.NoError(t, err)
	require.Equal(t, filepath.Join(filepath.Dir(parent), "c"), cleaned)
	for _, id := range []string{"", "..", "a/b", "."} {
		_, err = m.Stop(t.Context(), id)
		require.Error(t, err, id)
	}
}

func TestInfo(t *testing.T) {
	m := &Manager{}
	info, err := m.Info(t.Context(), bytes.NewReader(marshal(t, options(t))))
	require.NoError(t, err)
	require.Equal(t, "io.containerd.cloister.v2", info.GetName())
	require.NotEmpty(t, info.GetVersion().GetVersion())
	require.Equal(t, "erofs,format/*,mkdir/*,mkfs/*", info.GetAnnotations()["containerd.io/runtime-allow-mounts"])
	require.True(t, proto.Equal(options(t), info.GetOptions()))
	var f features.Features
	require.NoError(t, json.Unmarshal(info.GetFeatures().GetValue(), &f))
	require.Contains(t, f.Linux.Namespaces, "network")
	require.Subset(t, f.MountOptions, []string{"bind", "ro", "rro", "rslave"})
	require.True(t, *f.Linux.MountExtensions.IDMap.Enabled)

	info, err = m.Info(t.Context(), strings.NewReader(""))
	require.NoError(t, err)
	require.Nil(t, info.GetOptions())
	_, err = m.Info(t.Context(), strings.NewReader("\xff"))
	require.Error(t, err)
}
