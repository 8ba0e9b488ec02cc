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
			m, reason = origin(m, s)
			if m.Kind == Scratch {
				_, err := scratch(m, 0)
				reason = firstReason(err)
			}
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
	if reason := follows(m); reason != "" {
		return refused("%s", reason)
	}
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

// origin finds the volume that a part was taken from, which the host's mounts tell, and returns the part as what it is with that:
// a copy, a part of an emptyDir, or live. The reason says why it cannot be had; empty if it can.
func origin(m Mount, s Sharing) (_ Mount, reason string) {
	of, err := volumes.SubPathOf(m.Volume, m.Source)
	if err != nil {
		if m.OrLive {
			m.Kind = Live
			return m, firstReason(shareable(m))
		}
		return m, fmt.Sprintf("%s at %s, a part (subPath) of volume %s: %v", m.Source, m.Destination, m.Volume.Volume, err)
	}
	whole := m
	whole.Source = filepath.Join(of.Dir(), of.Rest)
	if m.OrLive {
		whole = whole.live()
	} else {
		whole = whole.apart(s)
	}
	switch whole.Kind {
	case Scratch:
		whole.Source = m.Source
		return whole, ""
	case Live: // as the kubelet has mounted it
		m.Kind = Live
		return m, firstReason(shareable(m))
	}
	return m, whole.Reason
}
