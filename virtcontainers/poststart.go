// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"sync"

	"github.com/cloister-project/cloister/virtcontainers/hooks"
)

// poststart runs hooks behind a container's start. They run in the goroutine of whoever starts the container, and nobody
// is to wait for ever for one that hangs: they are killed when that call's context ends, when the pod does, or when the
// container is given back, which comes before its poststop hooks. The zero value is ready.
type poststart struct {
	mu    sync.Mutex
	ended bool
	// cancel and done are of the run under way, or the last one.
	cancel context.CancelFunc
	done   chan struct{}
}

// run calls f, unless end was called before. It must not be called again before it has returned.
func (s *poststart) run(ctx, life context.Context, f func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(life, cancel)()
	done := make(chan struct{})
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return
	}
	s.cancel, s.done = cancel, done
	s.mu.Unlock()
	defer close(done)
	f(ctx)
}

// end kills what runs and waits until it is gone. Nothing runs any more.
func (s *poststart) end() {
	s.mu.Lock()
	s.ended = true
	cancel, done := s.cancel, s.done
	s.mu.Unlock()
	if done != nil {
		cancel()
		<-done
	}
}

// runPoststartHooks runs the hooks that follow the start of the container's init. A container that ends meanwhile does not
// keep them from running to their end, and none of them can make the start fail.
func (c *Container) runPoststartHooks(ctx context.Context) {
	h := c.spec.Hooks
	if h == nil || len(h.Poststart) == 0 {
		return
	}
	state := hookState(c.id, c.bundle, int(c.pid()), c.spec.Annotations)
	c.poststart.run(ctx, c.pod.life, func(ctx context.Context) { hooks.Poststart(ctx, h, state) })
}
