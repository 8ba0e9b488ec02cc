// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cloister-project/cloister/test/harness"
)

// TestHooks runs a container whose specification has OCI hooks. They run on the host, each once and in order, and one
// behind the start that fails does not fail it.
func TestHooks(t *testing.T) {
	n := sharedNode(t)
	ctx := namespaces.WithNamespace(testContext(t), n.Name)
	const id = "hooks"
	dir := t.TempDir()
	words := func() string {
		b, err := os.ReadFile(filepath.Join(dir, "words"))
		require.NoError(t, err)
		return string(b)
	}
	// hook says its name and keeps the state that it gets.
	hook := func(name string, status int) specs.Hook {
		script := fmt.Sprintf("cat > %[1]s/%[2]s.json; echo %[2]s >> %[1]s/words; exit %[3]d", dir, name, status)
		return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script}}
	}
	state := func(name string) (s specs.State) {
		b, err := os.ReadFile(filepath.Join(dir, name+".json"))
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(b, &s))
		return s
	}

	removeAfter(t, n, id)
	succeed(t, n.Ctr(ctx, "container", "create", "--runtime", runtimeName, "--runtime-config-path", n.CloisterConfig,
		harness.BusyboxImage, id, "sh", "-c", idle))
	refused := &specs.Hooks{
		CreateRuntime:   []specs.Hook{hook("createRuntime", 0)},
		CreateContainer: []specs.Hook{hook("createContainer", 0)}, StartContainer: []specs.Hook{hook("startContainer", 0)},
	}
	changeSpec(t, n, id, func(s *specs.Spec) { s.Hooks = refused })
	failed := run(t, n.Ctr(ctx, "task", "start", "-d", "--null-io", id))
	assert.NotZero(t, failed.status)
	requireContains(t, failed.stderr, "createContainer", "startContainer")
	assert.NoFileExists(t, filepath.Join(dir, "words"), "none has run")

	changeSpec(t, n, id, func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{
			CreateRuntime: []specs.Hook{hook("createRuntime", 0)},
			Poststart:     []specs.Hook{hook("failing", 3), hook("poststart", 0)},
			Poststop:      []specs.Hook{hook("poststop", 0)},
		}
	})
	succeed(t, n.Ctr(ctx, "task", "start", "-d", "--null-io", id))
	assert.Equal(t, "createRuntime\nfailing\npoststart\n", words(), "all have run when the start is answered")
	answer, err := tasksOf(t, n).Get(ctx, &tasks.GetRequest{ContainerID: id})
	require.NoError(t, err)
	assert.Equal(t, specs.StateCreating, state("createRuntime").Status)
	for _, name := range []string{"failing", "poststart"} {
		s := state(name)
		assert.Equal(t, id, s.ID)
		assert.Equal(t, specs.StateRunning, s.Status)
		assert.EqualValues(t, answer.GetProcess().GetPid(), s.Pid, "what stands for the container on the host")
	}

	succeed(t, n.Ctr(ctx, "task", "exec", "--exec-id", "one", id, "true"))
	assert.Equal(t, "createRuntime\nfailing\npoststart\n", words(), "an exec has no hooks")
	_, err = tasksOf(t, n).Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: 9})
	require.NoError(t, err)
	exit, err := tasksOf(t, n).Wait(ctx, &tasks.WaitRequest{ContainerID: id})
	require.NoError(t, err)
	assert.EqualValues(t, 137, exit.GetExitStatus())
	succeed(t, n.Ctr(ctx, "task", "rm", id))
	assert.Equal(t, "createRuntime\nfailing\npoststart\npoststop\n", words())
	assert.Equal(t, specs.StateStopped, state("poststop").Status)
}

// changeSpec changes the specification of a container that has no task yet, where ctr has no option for it.
func changeSpec(t *testing.T, n *harness.Node, id string, change func(*specs.Spec)) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	client := containers.NewContainersClient(conn)
	ctx := namespaces.WithNamespace(testContext(t), n.Name)
	got, err := client.Get(ctx, &containers.GetContainerRequest{ID: id})
	require.NoError(t, err)
	container := got.GetContainer()
	var spec specs.Spec
	require.NoError(t, json.Unmarshal(container.GetSpec().GetValue(), &spec))
	change(&spec)
	container.Spec.Value, err = json.Marshal(&spec)
	require.NoError(t, err)
	_, err = client.Update(ctx, &containers.UpdateContainerRequest{
		Container: container, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec"}},
	})
	require.NoError(t, err)
}
