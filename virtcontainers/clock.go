// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/virtcontainers/guest"
)

// clockInterval is how often the guest's clock is compared with the host's. A VM that stood still (the host slept,
// somebody stopped QEMU) has a late clock until then; the agent leaves a clock alone that is nearly right.
const clockInterval = 30 * time.Second

// keepClock keeps the guest's wall clock in step until ctx ends.
func (p *Pod) keepClock(ctx context.Context, g *guest.Client) {
	tick := time.NewTicker(clockInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := g.SetClock(ctx, time.Now())
		if err != nil && ctx.Err() == nil && !errdefs.IsUnavailable(err) {
			log.G(ctx).WithError(err).WithField("sandbox", p.cfg.ID).Warn("set the guest's clock")
		}
	}
}
