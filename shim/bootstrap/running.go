// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// runningTime bounds the question to a shim that has our socket.
const runningTime = 2 * time.Second

// RunningVersion asks the shim at an address which version of the API it serves. That may be an older binary than this
// one (containerd#10888).
func RunningVersion(ctx context.Context, address string) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, runningTime)
	defer cancel()
	conn, err := shim.AnonDialer(address, runningTime)
	if err != nil {
		return 0, err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	_, err = taskapi.NewTTRPCTaskClient(client).Connect(ctx, &taskapi.ConnectRequest{})
	switch native := errgrpc.ToNative(err); {
	case err == nil, errdefs.IsNotFound(native):
		return apiVersion, nil
	case errdefs.IsNotImplemented(native):
		return 2, nil
	case ctx.Err() != nil:
		// It listens, but is too busy to answer: alive, and its socket is not to be taken away.
		return apiVersion, nil
	}
	return 0, err
}
