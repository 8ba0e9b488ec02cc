// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
)

// registerV2 serves version 2 of the API, for containerd 1.x, with the messages of version 3: names of messages do not
// travel.
func registerV2(server *ttrpc.Server, s taskapi.TTRPCTaskService) {
	server.RegisterService("containerd.task.v2.Task", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      unary(s.State),
		"Create":     unary(s.Create),
		"Start":      unary(s.Start),
		"Delete":     unary(s.Delete),
		"Pids":       unary(s.Pids),
		"Pause":      unary(s.Pause),
		"Resume":     unary(s.Resume),
		"Checkpoint": unary(s.Checkpoint),
		"Kill":       unary(s.Kill),
		"Exec":       unary(s.Exec),
		"ResizePty":  unary(s.ResizePty),
		"CloseIO":    unary(s.CloseIO),
		"Update":     unary(s.Update),
		"Wait":       unary(s.Wait),
		"Stats":      unary(s.Stats),
		"Connect":    unary(s.Connect),
		"Shutdown":   unary(s.Shutdown),
	}})
}

func unary[Req, Resp any](call func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var req Req
		if err := unmarshal(&req); err != nil {
			return nil, err
		}
		return call(ctx, &req)
	}
}
