// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloister-project/cloister/virtcontainers/refusal"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// Look returns the mounts with those refused that the host's files show to be impossible in a VM that shares so much
// with the host. A source that is not there, or cannot be read, is left to Attach: it may come until then.
func Look(all []Mount, s Sharing) []Mount {
	out := make([]Mount, 0, len(all))
	for _, m := range all {
		var reason string
		switch m.Kind {
		case Live:
			reason = firstReason(shareable(m))
		case Part:
			reason = origin(m, s)
		case Scratch:
			_, err := scratch(m, 0)
			reason = firstReason(err)
		case ImageVolume:
			_, err := emptyImageVolume(m)
			reason = firstReason(err)
		}
		if reason != "" {
			m = m.refuse(reason)
		}
		out = append(out, m)
	}
	return out
}

// refused is the error of one mount that cannot be had.
func refused(format string, a ...any) error {
	return refusal.Of([]string{fmt.Sprintf(format, a...)})
}

// firstReason is why something is refused, empty for other errors and none.
func firstReason(err error) string {
	if reasons, _ := refusal.Reasons(err); len(reasons) > 0 {
		return reasons[0]
	}
	return ""
}

// shareable returns why what a live mount brings cannot be shared with a VM, nil if it can.
func shareable(m Mount) error {
	info, err := os.Stat(m.Source)
	if err != nil {
		return fmt.Errorf("bind mount of %s at %s: %w", m.Source, m.Destination, err)
	}
	if info.IsDir() || info.Mode().IsRegular() {
		return nil
	}
	return refused("%s of the host (%s) at %s: only files and directories can be shared with a VM, not devices, sockets or pipes",
		m.Source, info.Mode().Type(), m.Destination)
}

// origin returns why a part of a volume cannot be had, which the host's mounts tell: it may have been taken from a volume
// that is not copied; empty if it can.
func origin(m Mount, s Sharing) string {
	of, err := volumes.SubPathOf(m.Volume, m.Source)
	if err != nil {
		return fmt.Sprintf("%s at %s, a part (subPath) of volume %s: %v", m.Source, m.Destination, m.Volume.Volume, err)
	}
	whole := Mount{Source: filepath.Join(of.Dir(), of.Rest), Destination: m.Destination}
	return whole.apart(s).Reason
}
