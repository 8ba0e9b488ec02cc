// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// reference is what a template of containerd's mount manager refers to: "{{ mount 1 }}/upper", "{{ overlay 0 2 }}".
type reference struct {
	// mounts by index, in the order of the template.
	mounts []int
	// rest is the path below the mount.
	rest string
}

// hasTemplate reports whether s is for the "format" transform.
func hasTemplate(s string) bool { return strings.Contains(s, "{{") }

// parseTemplate reads a string that is one template, with a path after it perhaps. Nothing else that Go's templates could do is
// understood. count is the number of mounts before the one that s belongs to.
func parseTemplate(s string, count int) (reference, error) {
	bad := func(why string) (reference, error) {
		return reference{}, fmt.Errorf("template %.200q: %s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	body, ok := strings.CutPrefix(s, "{{")
	if !ok {
		return bad("it does not begin with {{")
	}
	body, rest, ok := strings.Cut(body, "}}")
	if !ok {
		return bad("it has no }}")
	}
	if hasTemplate(rest) || (rest != "" && !strings.HasPrefix(rest, "/")) {
		return bad("more than a path follows it")
	}
	fields := strings.Fields(body)
	if len(fields) == 0 {
		return bad("it is empty")
	}
	index := make([]int, 0, 2)
	for _, f := range fields[1:] {
		n, err := strconv.Atoi(f)
		if err != nil || n < 0 || n >= count {
			return bad(fmt.Sprintf("%q is not the number of one of the %d mounts before it", f, count))
		}
		index = append(index, n)
	}
	switch {
	case fields[0] == "mount" && len(index) == 1:
		return reference{mounts: index, rest: rest}, nil
	case fields[0] == "overlay" && len(index) == 2 && rest == "":
		r := reference{mounts: []int{index[0]}}
		for i := index[0]; i != index[1]; {
			if index[1] > i {
				i++
			} else {
				i--
			}
			r.mounts = append(r.mounts, i)
		}
		return r, nil
	}
	return bad("only {{ mount N }} and {{ overlay N M }} are understood")
}
