// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"cmp"
	"fmt"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/tee"
)

// CheckHello compares what the guest says of its launch with what was launched: errdefs.ErrFailedPrecondition. It protects
// nobody from a hostile guest; it finds a guest image of another release, or one that was sealed for something else.
func (p *Plan) CheckHello(h *agentv1.Hello) error {
	got := cmp.Or(tee.Name(h.GetTee()), tee.None)
	if want := p.Name(); got != want {
		return fmt.Errorf("the VM was launched with tee.platform = %q and its guest says %.128q: build or seal the guest image for this "+
			"platform: %w",
			want, got, errdefs.ErrFailedPrecondition)
	}
	if digest := p.InitdataDigest(); h.GetInitdata() != digest {
		found := "none"
		if h.GetInitdata() != "" {
			found = fmt.Sprintf("%.256q", h.GetInitdata()) // a guest's words
		}
		return fmt.Errorf("the pod's initdata is %s and the guest found %s bound to its launch: %w",
			cmp.Or(digest, "none"), found, errdefs.ErrFailedPrecondition)
	}
	return nil
}
