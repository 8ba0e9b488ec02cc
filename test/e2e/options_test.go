// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cloister-project/cloister/test/harness"
)

// TestRuncOptions makes a task with runc's options, as clients that know no other runtime do.
func TestRuncOptions(t *testing.T) {
	n := sharedNode(t)
	ctx := namespaces.WithNamespace(testContext(t), n.Name)
	const id = "runc-options"
	removeAfter(t, n, id)
	succeed(t, n.Ctr(ctx, "container", "create", "--runtime", runtimeName, "--runtime-config-path", n.CloisterConfig,
		harness.BusyboxImage, id, "sh", "-c", "exit 7"))
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	mounts, err := snapshots.NewSnapshotsClient(conn).Mounts(ctx, &snapshots.MountsRequest{Snapshotter: "overlayfs", Key: id})
	require.NoError(t, err)
	request := func(o *runcoptions.Options) *tasks.CreateTaskRequest {
		options, err := typeurl.MarshalAnyToProto(o)
		require.NoError(t, err)
		return &tasks.CreateTaskRequest{ContainerID: id, Rootfs: mounts.GetMounts(), Options: options}
	}

	client := tasksOf(t, n)
	_, err = client.Create(ctx, request(&runcoptions.Options{BinaryName: "crun"}))
	require.ErrorContains(t, err, `asks for the program "crun"`)
	// The node's configuration is in the options that the shim was started with.
	_, err = client.Create(ctx, request(&runcoptions.Options{NoNewKeyring: true, IoUid: 1000, IoGid: 1000}))
	require.NoError(t, err)
	_, err = client.Start(ctx, &tasks.StartRequest{ContainerID: id})
	require.NoError(t, err)
	exit, err := client.Wait(ctx, &tasks.WaitRequest{ContainerID: id})
	require.NoError(t, err)
	assert.EqualValues(t, 7, exit.GetExitStatus())
	_, err = client.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	require.NoError(t, err)
}
