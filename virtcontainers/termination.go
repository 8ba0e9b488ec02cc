// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/virtcontainers/mounts"
)

// terminationLog is the host's file of the first termination log that is a file of the guest's.
func (p *containerPlan) terminationLog() string {
	for _, m := range p.mounts {
		if m.Kind == mounts.TerminationLog {
			return m.Source
		}
	}
	return ""
}

// saveTermination brings what the guest says that the container said of its end to the host's file, before anybody learns of the
// exit: the kubelet reads it then.
func (c *Container) saveTermination(ctx context.Context, message []byte) {
	if c.terminationLog == "" || len(message) == 0 {
		return
	}
	logger := log.G(ctx).WithField("container", c.id)
	if len(message) > wire.MaxTerminationMessage {
		logger.Warnf("the guest's termination message has %d bytes, more than %d: it is dropped", len(message), wire.MaxTerminationMessage)
		return
	}
	if err := mounts.SaveTermination(c.terminationLog, message); err != nil {
		logger.WithError(err).Warn("the termination message is lost")
	}
}
