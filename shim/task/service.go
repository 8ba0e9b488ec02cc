// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/pods"
)

// Publisher takes events in their order; it does not block.
type Publisher interface {
	Publish(event any)
}

// Config of the service.
type Config struct {
	// Namespace of containerd that the shim serves.
	Namespace string
	Holder    *pods.Holder
	NewPod    pods.NewFunc
	Events    Publisher
	// Options are the runtime options that the shim was started with; nil for none.
	Options func() (*anypb.Any, error)
	// Shutdown ends the process once the request of ctx was answered. It is safe to repeat.
	Shutdown func(ctx context.Context)
}

// Service implements the Task service. Its errors are errdefs kinds; whoever registers it turns them into statuses.
type Service struct {
	Config

	// life carries the goroutines that outlive requests.
	life    context.Context
	endLife context.CancelFunc
	running sync.WaitGroup
	// lastExitTime is the constant but in tests.
	lastExitTime time.Duration

	mu      sync.Mutex
	tasks   map[string]*task
	deleted results
	// quitWhenIdle: containerd asked for the end while creations were being undone.
	quitWhenIdle bool
}

var _ taskapi.TTRPCTaskService = (*Service)(nil)

// New makes the service. ctx carries the logger and values; Close ends the service.
func New(ctx context.Context, c Config) *Service {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	return &Service{Config: c, life: life, endLife: end, lastExitTime: lastExitTime, tasks: map[string]*task{}}
}

// Close stops the pod of tasks, waits until the exits are published, for as long as ctx allows, and ends the service's
// goroutines.
func (s *Service) Close(ctx context.Context) error {
	var err error
	if pod, _, mode, gerr := s.Holder.Get(); gerr == nil && mode != pods.ModeSandbox {
		err = pod.Stop(ctx)
	}
	if err == nil {
		s.AwaitExits(ctx)
	}
	s.endLife()
	s.running.Wait()
	return err
}

// RegisterTTRPC registers both versions: their messages are the same on the wire (a test compares them).
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	registerV2(server, s)
	return nil
}

// task is a container as containerd sees it.
type task struct {
	id, bundle string
	pause      bool
	pid        uint32

	// made is closed when Create has ended; container and init are set before, if it worked.
	made      chan struct{}
	container pods.Container
	init      *process

	mu    sync.Mutex
	execs map[string]*process
	// ending: the init has exited, no exec starts any more.
	ending bool
	del    *deletion
}

// created reports whether Create has worked.
func (t *task) created() bool {
	select {
	case <-t.made:
		return t.init != nil
	default:
		return false
	}
}

func notFound(id, execID string) error {
	if execID != "" {
		return fmt.Errorf("process %s in container %s: %w", execID, id, errdefs.ErrNotFound)
	}
	return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// task returns a task that was created.
func (s *Service) task(id string) (*task, error) {
	s.mu.Lock()
	t := s.tasks[id]
	s.mu.Unlock()
	if t == nil || !t.created() {
		return nil, notFound(id, "")
	}
	return t, nil
}

// process returns the init for an empty exec id.
func (s *Service) process(id, execID string) (*process, error) {
	t, err := s.task(id)
	if err != nil {
		return nil, err
	}
	if execID == "" {
		return t.init, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.execs[execID]; p != nil && p.proc != nil {
		return p, nil
	}
	return nil, notFound(id, execID)
}

// reserve takes an id for a task to be created.
func (s *Service) reserve(r *taskapi.CreateTaskRequest) (*task, error) {
	t := &task{id: r.GetID(), bundle: r.GetBundle(), made: make(chan struct{}), execs: map[string]*process{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.tasks[t.id]; ok {
		return nil, fmt.Errorf("container %s: %w", t.id, errdefs.ErrAlreadyExists)
	}
	s.tasks[t.id] = t
	s.deleted.forget(t.id, "")
	return t, nil
}

// remove takes a task off the table, and ends the process if containerd has asked for that.
func (s *Service) remove(t *task, result *taskapi.DeleteResponse) {
	s.mu.Lock()
	delete(s.tasks, t.id)
	if result != nil {
		s.deleted.add(t.id, "", result)
	}
	quit := s.quitWhenIdle && len(s.tasks) == 0
	s.mu.Unlock()
	if quit && s.Holder.Mode() != pods.ModeSandbox {
		// There is no request to be answered first.
		answered, cancel := context.WithCancel(s.life)
		cancel()
		s.Config.Shutdown(answered)
	}
}

// OnOOM publishes that the OOM killer struck in a container. It does not block.
func (s *Service) OnOOM(containerID string) {
	t, err := s.task(containerID)
	if err != nil {
		return
	}
	if t.init.holdOOM() {
		return
	}
	s.Events.Publish(&eventstypes.TaskOOM{ContainerID: containerID})
}

// AwaitExits waits until the exits of all tasks were published, or ctx ends. The pod has ended, so that all do.
func (s *Service) AwaitExits(ctx context.Context) { s.awaitExits(ctx, nil) }

// awaitExits leaves out one task, that of the pause container.
func (s *Service) awaitExits(ctx context.Context, but *task) {
	s.mu.Lock()
	var others []*task
	for _, t := range s.tasks {
		if t != but && t.created() {
			others = append(others, t)
		}
	}
	s.mu.Unlock()
	for _, t := range others {
		select {
		case <-t.init.exited:
		case <-ctx.Done():
			return
		}
	}
}
