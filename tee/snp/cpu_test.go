// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"bufio"
	"context"
	"encoding/json"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestCPUSignature(t *testing.T) {
	for model, want := range map[string]uint32{
		"EPYC": 0x800f12, "EPYC-v1": 0x800f12, "EPYC-v4": 0x800f12, "EPYC-IBPB": 0x800f12,
		"EPYC-Rome": 0x830f10, "EPYC-Rome-v4": 0x830f10,
		"EPYC-Milan": 0xa00f11, "EPYC-Milan-v1": 0xa00f11, "EPYC-Milan-v4": 0xa00f11,
		"EPYC-Genoa": 0xa10f10, "EPYC-Genoa-v3": 0xa10f10,
		"EPYC-Turin": 0xb00f00, "EPYC-Turin-v2": 0xb00f00,
		"EPYC-v4,+x2apic,pmu=off": 0x800f12,
	} {
		got, err := CPUSignature(model)
		require.NoError(t, err, model)
		require.Equal(t, want, got, model)
	}
	for _, model := range []string{"", "host", "max", "host,-pmu", "EPYC-v9", "epyc", "EPYC-Milan-v0", "Opteron_G5", "qemu64",
		"EPYC-v4,family=25", "EPYC-v4,+x2apic,stepping=1", "EPYC-v4,model=1"} {
		_, err := CPUSignature(model)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, model)
	}
	// A family below 15 has no extended part.
	require.Equal(t, uint32(0x306a9), cpuFamily{family: 6, model: 0x3a, stepping: 9}.signature())
}

// TestCPUSignaturesAreQEMUs asks the binary, which gives family, model and stepping of each model that it has.
func TestCPUSignaturesAreQEMUs(t *testing.T) {
	binary := testFile(t, "CLOISTER_TEST_QEMU")
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-machine", "none", "-accel", "tcg", "-nodefaults", "-display", "none", "-qmp", "stdio")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, 4<<20)
	require.True(t, lines.Scan(), "the greeting")
	// ask returns false if QEMU refuses.
	ask := func(command string, arguments any, result any) bool {
		require.NoError(t, json.NewEncoder(stdin).Encode(map[string]any{"execute": command, "arguments": arguments}))
		require.True(t, lines.Scan(), lines.Err())
		var reply struct {
			Return json.RawMessage
			Error  json.RawMessage
		}
		require.NoError(t, json.Unmarshal(lines.Bytes(), &reply))
		if reply.Error != nil {
			return false
		}
		require.NoError(t, json.Unmarshal(reply.Return, result))
		return true
	}
	require.True(t, ask("qmp_capabilities", map[string]any{}, &struct{}{}))
	found := 0
	for _, name := range CPUModels() {
		var expansion struct {
			Model struct {
				Props struct {
					Family, Model, Stepping uint32
				}
			}
		}
		if !ask("query-cpu-model-expansion", map[string]any{"type": "full", "model": map[string]any{"name": name}}, &expansion) {
			continue // this QEMU is older than the model
		}
		found++
		p := expansion.Model.Props
		want, err := CPUSignature(name)
		require.NoError(t, err)
		require.Equal(t, want, cpuFamily{family: p.Family, model: p.Model, stepping: p.Stepping}.signature(), name)
	}
	require.GreaterOrEqual(t, found, 15, "models that this QEMU has, of %d", len(CPUModels()))
	t.Logf("%d of %d models compared", found, len(CPUModels()))
}
