// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"time"
)

// undo is a stack of steps that take back what was done. It is used by one goroutine at a time.
type undo struct {
	budget time.Duration
	steps  []func(context.Context)
}

// add puts a step on the stack.
func (u *undo) add(step func(context.Context)) { u.steps = append(u.steps, step) }

// run takes all steps from the stack, last first, on a context of its own: the steps run although the caller's context
// may have ended.
func (u *undo) run(ctx context.Context) {
	if len(u.steps) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), u.budget)
	defer cancel()
	for len(u.steps) > 0 {
		last := u.steps[len(u.steps)-1]
		u.steps = u.steps[:len(u.steps)-1]
		last(ctx)
	}
}
