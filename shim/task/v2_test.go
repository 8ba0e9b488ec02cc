// SPDX-License-Identifier: Apache-2.0

package task

import (
	"net"
	"path/filepath"
	"testing"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"google.golang.org/protobuf/reflect/protodesc"
)

// TestV2HasTheWireFormatOfV3 is why version 3's messages can serve both.
func TestV2HasTheWireFormatOfV3(t *testing.T) {
	v2 := protodesc.ToFileDescriptorProto(taskv2.File_runtime_task_v2_shim_proto)
	v3 := protodesc.ToFileDescriptorProto(taskapi.File_runtime_task_v3_shim_proto)
	fields := func(f *descriptorpb.FileDescriptorProto) map[string]map[int32]string {
		all := map[string]map[int32]string{}
		for _, m := range f.GetMessageType() {
			all[m.GetName()] = map[int32]string{}
			for _, d := range m.GetField() {
				all[m.GetName()][d.GetNumber()] = d.GetName() + " " + d.GetType().String() + " " + d.GetLabel().String()
			}
		}
		return all
	}
	require.Equal(t, fields(v3), fields(v2))
	require.Len(t, v3.GetService()[0].GetMethod(), len(v2.GetService()[0].GetMethod()))
	for i, m := range v2.GetService()[0].GetMethod() {
		require.Equal(t, v3.GetService()[0].GetMethod()[i].GetName(), m.GetName())
	}
}

func TestBothVersionsAreServed(t *testing.T) {
	f := newFixture(t)
	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	require.NoError(t, f.RegisterTTRPC(server))
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(t.Context(), l) }()
	conn, err := net.Dial("unix", socket)
	require.NoError(t, err)
	client := ttrpc.NewClient(conn)
	defer func() {
		require.NoError(t, client.Close())
		require.NoError(t, server.Close())
		require.ErrorIs(t, <-served, ttrpc.ErrServerClosed)
	}()

	_, err = taskv2.NewTTRPCTaskClient(client).Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c", Bundle: f.bundle("c", nil)})
	require.NoError(t, err)
	two, err := taskv2.NewTTRPCTaskClient(client).State(t.Context(), &taskv2.StateRequest{ID: "c"})
	require.NoError(t, err)
	three, err := taskapi.NewTTRPCTaskClient(client).State(t.Context(), &taskapi.StateRequest{ID: "c"})
	require.NoError(t, err)
	a, err := proto.Marshal(two)
	require.NoError(t, err)
	b, err := proto.Marshal(three)
	require.NoError(t, err)
	require.Equal(t, a, b)
}
