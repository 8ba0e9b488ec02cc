// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"fmt"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

// Sharing says whether a VM sees files and directories of the host live, and why not. The zero value shares nothing. It
// is computed once for a pod and passed along.
type Sharing struct {
	live bool
	why  string
}

// SharingOf returns what a VM of a platform and an architecture shares with the host.
func SharingOf(platform tee.Name, arch hypervisor.Architecture) Sharing {
	switch {
	case platform.Confidential():
		return Sharing{why: "the host could read and change it, and a confidential VM shares no files with the host"}
	case arch != hypervisor.ArchAMD64:
		return Sharing{why: fmt.Sprintf("a VM of architecture %s shares no files with the host yet", arch)}
	}
	return Sharing{live: true}
}

// Live reports whether the VM sees the host's files live.
func (s Sharing) Live() bool { return s.live }

// Reason is why the VM shares no files with the host; empty if it does.
func (s Sharing) Reason() string {
	if s.live || s.why != "" {
		return s.why
	}
	return "this VM shares no files with the host"
}
