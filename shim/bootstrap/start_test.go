// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testID        = "c0ffee"
	testNamespace = "k8s.io"
	testGRPC      = "/run/containerd/containerd.sock"
	testTTRPC     = "/run/containerd/containerd.sock.ttrpc"
)

// options as each version of containerd has them, typeurl and all.
func options(t testing.TB) *anypb.Any {
	data, err := proto.Marshal(&runtimeoptions.Options{TypeUrl: "io.cloister.Options", ConfigPath: "/etc/cloister/cloister.toml"})
	require.NoError(t, err)
	return &anypb.Any{TypeUrl: runtimeOptionsType, Value: data}
}

func marshal(t testing.TB, m proto.Message) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	require.NoError(t, err)
	return data
}

// bootstrapInput is what containerd's core/runtime/v2/command.go writes; 2.3 knows no directory for sockets.
func bootstrapInput(t testing.TB, version string, socketDir *string) []byte {
	p := &bootapi.BootstrapParams{
		InstanceID: testID, Namespace: testNamespace, LogLevel: bootapi.LogLevelFromString("info"), ContainerdVersion: version,
		ContainerdGrpcAddress: testGRPC, ContainerdTtrpcAddress: testTTRPC, ContainerdBinary: "/usr/bin/containerd",
		SocketDir: socketDir,
	}
	require.NoError(t, p.AddExtension(options(t)))
	return marshal(t, p)
}

// fakeDaemon stands for the shim's daemon: it keeps what it was started with.
type fakeDaemon struct {
	t       *testing.T
	started []Daemon
	cmds    []*exec.Cmd
	err     error
}

func (f *fakeDaemon) launch(d Daemon) (*os.Process, error) {
	if f.err != nil {
		return nil, f.err
	}
	f.started = append(f.started, d)
	cmd := exec.Command("sleep", "60")
	require.NoError(f.t, cmd.Start())
	f.cmds = append(f.cmds, cmd)
	// The command's own Process is what is killed at the end; Start releases this one.
	return os.FindProcess(cmd.Process.Pid)
}

func (f *fakeDaemon) end() {
	for _, c := range f.cmds {
		_ = c.Process.Kill()
		_ = c.Wait()
	}
}

// command is one as containerd invokes it, in a bundle of its own.
func command(t *testing.T, d *fakeDaemon, stdin []byte) Command {
	dir := t.TempDir()
	t.Cleanup(d.end)
	return Command{
		ID: testID, Namespace: testNamespace, GRPCAddress: testGRPC, TTRPCAddress: testTTRPC, PublishBinary: "/usr/bin/containerd",
		Dir: dir, Env: []string{"PATH=/usr/bin", "GOMAXPROCS=2", "MAX_SHIM_VERSION=2"}, Stdin: bytes.NewReader(stdin),
		Capabilities:     rootfs.MountCapabilities(),
		DefaultSocketDir: "s",
		MajorVersion:     func(string) int { return 2 },
		Launch:           d.launch,
		Running:          func(context.Context, string) (int32, error) { return 0, errors.New("nobody") },
	}
}

// TestDialects has the golden input and output of every kind of containerd. The address is relative so that it is the
// same everywhere.
func TestDialects(t *testing.T) {
	socketDir := "s"
	for _, tt := range []struct {
		name  string
		stdin []byte
		major int
		parse func(out []byte) (*bootapi.BootstrapResult, error)
	}{
		{"containerd-1.7", marshal(t, options(t)), 1, parse17},
		{"containerd-1.7-no-options", nil, 1, parse17},
		{"containerd-2.1", marshal(t, options(t)), 2, parse21},
		{"containerd-2.2-no-options", nil, 2, parse21},
		{"containerd-2.3", bootstrapInput(t, "v2.3.0", nil), 2, parse24},
		{"containerd-2.4", bootstrapInput(t, "v2.4.2", &socketDir), 2, parse24},
	} {
		t.Run(tt.name, func(t *testing.T) {
			golden, err := filepath.Abs(filepath.Join("testdata", tt.name))
			require.NoError(t, err)
			t.Chdir(t.TempDir())
			daemon := &fakeDaemon{t: t}
			c := command(t, daemon, tt.stdin)
			c.MajorVersion = func(binary string) int {
				require.Equal(t, "/usr/bin/containerd", binary)
				return tt.major
			}
			out, err := Start(t.Context(), c)
			require.NoError(t, err)
			if *update {
				require.NoError(t, os.WriteFile(golden+".stdin", tt.stdin, 0o644))
				require.NoError(t, os.WriteFile(golden+".stdout", out, 0o644))
			}
			in, err := os.ReadFile(golden + ".stdin")
			require.NoError(t, err)
			require.True(t, bytes.Equal(in, tt.stdin), "stdin")
			want, err := os.ReadFile(golden + ".stdout")
			require.NoError(t, err)
			require.Equal(t, want, out)

			// What that containerd makes of it.
			result, err := tt.parse(out)
			require.NoError(t, err)
			require.Equal(t, "ttrpc", result.GetProtocol())
			require.True(t, strings.HasPrefix(result.GetAddress(), "unix://s/"), result.GetAddress())
			require.FileExists(t, strings.TrimPrefix(result.GetAddress(), "unix://"))
			if tt.major > 1 {
				require.Equal(t, int32(3), result.GetVersion())
			}
			if strings.HasPrefix(tt.name, "containerd-2.3") || strings.HasPrefix(tt.name, "containerd-2.4") {
				var caps types.MountCapabilities
				found, err := result.FindExtension(&caps)
				require.NoError(t, err)
				require.True(t, found)
				require.Equal(t, []string{"erofs"}, caps.GetTypes())
				require.Equal(t, []string{"format", "mkdir", "mkfs"}, caps.GetTransforms())
			}

			// What the daemon gets.
			require.Len(t, daemon.started, 1)
			d := daemon.started[0]
			require.Equal(t, []string{"-namespace", testNamespace, "-id", testID, "-address", testGRPC}, d.Args)
			require.Equal(t, c.Dir, d.Dir)
			require.Len(t, d.Files, 1)
			require.Contains(t, d.Env, "TTRPC_ADDRESS="+testTTRPC)
			require.Greater(t, slices.Index(d.Env, "GOMAXPROCS=4"), slices.Index(d.Env, "GOMAXPROCS=2"))
			kept, err := bundle.ReadOptions(c.Dir)
			require.NoError(t, err)
			if strings.HasSuffix(tt.name, "no-options") {
				require.Nil(t, kept)
			} else {
				require.True(t, proto.Equal(options(t), kept), kept)
			}
			address, err := os.ReadFile(filepath.Join(c.Dir, "address"))
			require.NoError(t, err)
			require.Equal(t, result.GetAddress(), string(address))
		})
	}
}

// parse17 is containerd 1.7's runtime/v2/shim.go: parseStartResponse.
func parse17(out []byte) (*bootapi.BootstrapResult, error) {
	var p struct {
		Version           int
		Address, Protocol string
	}
	response := bytes.TrimSpace(out)
	if err := json.Unmarshal(response, &p); err != nil || p.Version < 2 {
		p.Address, p.Protocol = string(response), "ttrpc"
	}
	if p.Version > 2 {
		return nil, errors.New("unsupported shim version")
	}
	return &bootapi.BootstrapResult{Version: int32(p.Version), Address: p.Address, Protocol: p.Protocol}, nil
}

// parse21 is that of containerd 2.0 to 2.2.
func parse21(out []byte) (*bootapi.BootstrapResult, error) {
	var p struct {
		Version  int    `json:"version"`
		Address  string `json:"address"`
		Protocol string `json:"protocol"`
	}
	if err := json.Unmarshal(bytes.TrimSpace(out), &p); err != nil || p.Version < 2 {
		return nil, errors.Join(errors.New("taken for a version 2 shim"), err)
	}
	return &bootapi.BootstrapResult{Version: int32(p.Version), Address: p.Address, Protocol: p.Protocol}, nil
}

// parse24 is that of containerd 2.3 and 2.4.
func parse24(out []byte) (*bootapi.BootstrapResult, error) {
	var r bootapi.BootstrapResult
	return &r, proto.Unmarshal(out, &r)
}

func TestStartWithDebug(t *testing.T) {
	t.Chdir(t.TempDir())
	daemon := &fakeDaemon{t: t}
	c := command(t, daemon, nil)
	c.Debug = true
	_, err := Start(t.Context(), c)
	require.NoError(t, err)
	d := daemon.started[0]
	require.Contains(t, d.Args, "-debug")
	require.Len(t, d.Files, 2)
	i := slices.IndexFunc(d.Env, func(s string) bool { return strings.HasPrefix(s, DebugSocketEnv+"=unix://s/") })
	require.GreaterOrEqual(t, i, 0)
	require.FileExists(t, strings.TrimPrefix(d.Env[i], DebugSocketEnv+"=unix://"))
}

func TestGroupAnswersTheRunningShim(t *testing.T) {
	t.Chdir(t.TempDir())
	daemon := &fakeDaemon{t: t}
	first := command(t, daemon, bootstrapInput(t, "v2.4.2", proto.String("s")))
	out, err := Start(t.Context(), first)
	require.NoError(t, err)
	one, err := parse24(out)
	require.NoError(t, err)

	for label, version := range map[string]int32{"io.containerd.runc.v2.group": 3, "io.kubernetes.cri.sandbox-id": 2} {
		second := command(t, daemon, nil)
		second.ID = "member"
		config, err := json.Marshal(map[string]any{"annotations": map[string]string{label: testID}})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(second.Dir, "config.json"), config, 0o600))
		second.Running = func(_ context.Context, address string) (int32, error) {
			require.Equal(t, one.GetAddress(), address)
			return version, nil
		}
		out, err = Start(t.Context(), second)
		require.NoError(t, err)
		two, err := parse21(out)
		require.NoError(t, err)
		require.Equal(t, one.GetAddress(), two.GetAddress())
		require.Equal(t, version, two.GetVersion(), "the running shim's, not this binary's")
		require.Len(t, daemon.started, 1)
		require.NoError(t, bundle.EndShim(t.Context(), second.Dir, 0))
	}
}

func TestSocketOfADeadShimIsReplaced(t *testing.T) {
	t.Chdir(t.TempDir())
	daemon := &fakeDaemon{t: t}
	for range 2 {
		_, err := Start(t.Context(), command(t, daemon, nil))
		require.NoError(t, err)
	}
	require.Len(t, daemon.started, 2)
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	t.Chdir(t.TempDir())
	daemon := &fakeDaemon{t: t, err: errors.New("no memory")}
	c := command(t, daemon, nil)
	c.Debug = true
	_, err := Start(t.Context(), c)
	require.ErrorContains(t, err, "no memory")
	left, err := os.ReadDir("s")
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestStartRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	long := strings.Repeat("x", 60)
	other := bootstrapInput(t, "v2.4.2", nil)
	for name, tt := range map[string]struct {
		change func(c *Command)
		text   string
	}{
		"no id":           {func(c *Command) { c.ID = "" }, "-id"},
		"another id":      {func(c *Command) { c.ID, c.Stdin = "other", bytes.NewReader(other) }, "the command line says"},
		"another ns":      {func(c *Command) { c.Namespace, c.Stdin = "other", bytes.NewReader(other) }, "the command line says"},
		"neither":         {func(c *Command) { c.Stdin = strings.NewReader("\xff\xff") }, "neither"},
		"too much":        {func(c *Command) { c.Stdin = bytes.NewReader(make([]byte, maxInputBytes+1)) }, "more than"},
		"long socket dir": {func(c *Command) { c.Stdin = bytes.NewReader(bootstrapInput(t, "v2.4.2", &long)) }, "shorter directory"},
		"broken spec": {func(c *Command) {
			require.NoError(t, os.WriteFile(filepath.Join(c.Dir, "config.json"), []byte("{"), 0o600))
		}, "config.json"},
	} {
		t.Run(name, func(t *testing.T) {
			daemon := &fakeDaemon{t: t}
			c := command(t, daemon, nil)
			tt.change(&c)
			_, err := Start(t.Context(), c)
			require.ErrorContains(t, err, tt.text)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Empty(t, daemon.started)
		})
	}
}

func TestMajorOf(t *testing.T) {
	for name, tt := range map[string]struct {
		paths []string
		want  int
	}{
		"1.7": {[]string{"github.com/containerd/containerd/cmd/containerd", "github.com/containerd/containerd",
			"github.com/containerd/log"}, 1},
		"Debian's 1.7":    {[]string{"github.com/containerd/containerd/cmd/containerd", ""}, 1},
		"2.1":             {[]string{"github.com/containerd/containerd/v2/cmd/containerd", "github.com/containerd/containerd/v2"}, 2},
		"k3s with 1.7":    {[]string{"github.com/k3s-io/k3s/cmd/k3s", "github.com/k3s-io/k3s", "github.com/containerd/containerd"}, 1},
		"2 with 1's API":  {[]string{"x", "y", "github.com/containerd/containerd/api", "github.com/containerd/containerd/v2"}, 2},
		"something else":  {[]string{"example.com/x"}, 0},
		"only a relative": {[]string{"github.com/containerd/containerd-shim"}, 0},
	} {
		require.Equal(t, tt.want, majorOf(tt.paths), name)
	}
	self, err := os.Executable()
	require.NoError(t, err)
	require.Zero(t, MajorVersion(self), "no containerd")
	require.Zero(t, MajorVersion("/does/not/exist"))
	require.Zero(t, MajorVersion(""))
}

func FuzzParseInput(f *testing.F) {
	f.Add([]byte{})
	f.Add(marshal(f, options(f)))
	f.Add(bootstrapInput(f, "v2.4.2", nil))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, input []byte) {
		p, err := parseInput(input, testID, testNamespace)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		if p.dialect == dialectProtobuf {
			var b bootapi.BootstrapParams
			require.NoError(t, proto.Unmarshal(input, &b))
			require.Equal(t, testID, b.GetInstanceID())
			require.Equal(t, testNamespace, b.GetNamespace())
		}
		if len(input) == 0 {
			require.Nil(t, p.options)
		}
		require.NoError(t, bundle.WriteOptions(t.TempDir(), p.options))
	})
}

// Without containerd's ttrpc address no event would ever arrive.
func TestAddressesThatParametersLack(t *testing.T) {
	for name, tt := range map[string]struct {
		params      *bootapi.BootstrapParams
		grpc, ttrpc string
		want        string
	}{
		"in the parameters":         {&bootapi.BootstrapParams{ContainerdTtrpcAddress: "/a"}, testGRPC, testTTRPC, "/a"},
		"in the environment":        {&bootapi.BootstrapParams{ContainerdGrpcAddress: testGRPC}, "", testTTRPC, testTTRPC},
		"beside containerd's own":   {&bootapi.BootstrapParams{ContainerdGrpcAddress: "/g.sock"}, "", "", "/g.sock.ttrpc"},
		"beside the command line's": {&bootapi.BootstrapParams{}, "/c.sock", "", "/c.sock.ttrpc"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.params.InstanceID, tt.params.Namespace = testID, testNamespace
			p, err := readParams(Command{
				ID: testID, Namespace: testNamespace, GRPCAddress: tt.grpc, TTRPCAddress: tt.ttrpc, Stdin: bytes.NewReader(marshal(t, tt.params)),
			})
			require.NoError(t, err)
			require.Equal(t, dialectProtobuf, p.dialect)
			require.Equal(t, tt.want, p.ttrpcAddress)
		})
	}
}
