// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/bootstrap"
	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/events"
	"github.com/cloister-project/cloister/shim/pods"
	"github.com/cloister-project/cloister/shim/sandbox"
	"github.com/cloister-project/cloister/shim/task"
)

const (
	// answerTime is what the connection's goroutine gets to write the last answer: ttrpc tells when it has taken an
	// answer over, not when it has written it.
	answerTime = 50 * time.Millisecond
	// stopTime bounds the stop of a pod that runs when the process is to end; containerd/pkg/shim gives 30 s in all.
	stopTime = 20 * time.Second
	// eventsTime bounds the delivery of the last events.
	eventsTime = 3 * time.Second
)

// register tells containerd/pkg/shim of the services.
func register(newPod pods.NewFunc) {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "cloister",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			// Not used, see package events; it only holds a connection.
			if p, err := ic.GetByID(plugins.EventPlugin, "publisher"); err == nil {
				if c, ok := p.(io.Closer); ok {
					_ = c.Close()
				}
			}
			sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			sender, err := events.NewSender(ic.Properties[plugins.PropertyTTRPCAddress])
			if err != nil {
				return nil, err
			}
			dir, err := os.Getwd()
			if err != nil {
				return nil, err
			}
			return newServices(ic.Context, dir, newPod, sender, sd.(shutdown.Service))
		},
	})
	registry.Register(&plugin.Registration{
		Type:   plugins.HTTPHandler,
		ID:     "pprof",
		InitFn: func(*plugin.InitContext) (any, error) { return debugServer{}, nil },
	})
}

// sender delivers events.
type sender interface {
	io.Closer
	Send(ctx context.Context, e *events.Envelope) error
}

// services is the plugin: the Task and the Sandbox service on one pod.
type services struct {
	task    *task.Service
	sandbox *sandbox.Service
	events  *events.Queue
	sender  sender
	// sockets of the process, which pkg/shim may not find any more: containerd may have removed the working directory.
	sockets []string
}

// newServices puts the services together. dir is the bundle that the process was started in.
func newServices(ctx context.Context, dir string, newPod pods.NewFunc, sender sender, sd shutdown.Service) (*services, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	s := &services{sender: sender, events: events.NewQueue(ctx, namespace, sender.Send)}
	if address, err := shim.ReadAddress(filepath.Join(dir, "address")); err == nil {
		s.sockets = append(s.sockets, address)
	}
	if address := os.Getenv(bootstrap.DebugSocketEnv); address != "" {
		s.sockets = append(s.sockets, address)
	}
	holder := &pods.Holder{}
	options := func() (*anypb.Any, error) { return bundle.ReadOptions(dir) }
	end := func(request context.Context) {
		// The request's context ends when its answer was handed to the connection.
		context.AfterFunc(request, sd.Shutdown)
	}
	s.task = task.New(ctx, task.Config{
		Namespace: namespace, Holder: holder, NewPod: newPod, Events: s.events, Options: options, Shutdown: end,
	})
	s.sandbox = sandbox.New(ctx, sandbox.Config{
		Namespace: namespace, Holder: holder, NewPod: newPod, Options: options, Shutdown: end,
		OnOOM: s.task.OnOOM, AwaitExits: s.task.AwaitExits,
	})
	sd.RegisterCallback(s.close)
	return s, nil
}

// RegisterTTRPC registers all services.
func (s *services) RegisterTTRPC(server *ttrpc.Server) error {
	return errors.Join(s.task.RegisterTTRPC(server), s.sandbox.RegisterTTRPC(server))
}

// UnaryServerInterceptor turns the kinds of errors into statuses.
func (s *services) UnaryServerInterceptor() ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		resp, err := method(ctx, unmarshal)
		if err != nil {
			log.G(ctx).WithError(err).WithField("method", info.FullMethod).Debug("request failed")
			// Without details, which errgrpc makes of every further kind that was wrapped on the way: containerd prints
			// each as a line of its own.
			st := status.Convert(errgrpc.ToGRPC(err))
			return nil, status.Error(st.Code(), st.Message())
		}
		return resp, nil
	}
}

// close ends everything; pkg/shim ends the process when it returns.
func (s *services) close(ctx context.Context) error {
	timer := time.NewTimer(answerTime)
	defer timer.Stop()
	<-timer.C
	for _, address := range s.sockets {
		_ = shim.RemoveSocket(address)
	}
	stopCtx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	// The sandbox first: its stop gives the tasks their exits.
	err := errors.Join(s.sandbox.Close(stopCtx), s.task.Close(stopCtx))
	eventsCtx, cancelEvents := context.WithTimeout(ctx, eventsTime)
	defer cancelEvents()
	err = errors.Join(err, s.events.Close(eventsCtx), s.sender.Close())
	if err != nil {
		log.G(ctx).WithError(err).Error("end of the shim")
	}
	return nil
}
