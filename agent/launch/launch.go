// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/tee/initdata"
)

// Platforms, as package tee names them.
const (
	sample = "sample"
	snp    = "snp"
	tdx    = "tdx"
	se     = "se"
)

var platforms = []string{sample, snp, tdx, se}

// debugParameter makes the agent tell more (log.debug_console).
const debugParameter = "cloister.debug"

// Launch is what the kernel's command line says.
type Launch struct {
	// Platform as package tee names it; empty for an ordinary VM.
	Platform string
	// Debug asks the agent to tell more on the console.
	Debug bool
	// bound is the value of wire.ParamInitdata, initdata.BoundSize bytes; nil: there is none.
	bound []byte
}

// Confidential tells whether the rules of a confidential guest hold.
func (l Launch) Confidential() bool { return l.Platform != "" }

// Parse reads a kernel command line. With an error the guest must not go on; the Launch then has what could be told.
func Parse(cmdline string) (Launch, error) {
	var (
		l    Launch
		seen = map[string]bool{}
	)
	for word := range strings.FieldsSeq(cmdline) {
		name, value, _ := strings.Cut(word, "=")
		switch name {
		case wire.ParamTEE, wire.ParamInitdata:
			if seen[name] {
				return l, invalid("%s is there twice", name)
			}
			seen[name] = true
		case debugParameter:
			l.Debug = true
		default:
			// A slip of the pen, or quotes, must not make an ordinary VM of a confidential one.
			if strings.Contains(word, wire.ParamTEE) || strings.Contains(word, wire.ParamInitdata) {
				return l, invalid("%.80q is neither %s=NAME nor %s=HEX", word, wire.ParamTEE, wire.ParamInitdata)
			}
		}
		switch name {
		case wire.ParamTEE:
			if !slices.Contains(platforms, value) {
				return l, invalid("%s=%.40q: known are %s", name, value, strings.Join(platforms, ", "))
			}
			l.Platform = value
		case wire.ParamInitdata:
			bound, err := hex.DecodeString(value)
			if err != nil || len(bound) != initdata.BoundSize {
				return l, invalid("%s=%.140q is not %d bytes in hex", name, value, initdata.BoundSize)
			}
			if len(bytes.Trim(bound, "\x00")) == 0 {
				return l, invalid("%s is zero: leave it out where no initdata is bound", name)
			}
			l.bound = bound
		}
	}
	switch {
	case l.bound != nil && l.Platform != sample && l.Platform != se:
		return l, invalid("%s is not for platform %q, whose hardware binds initdata", wire.ParamInitdata, l.Platform)
	case l.Debug && l.Confidential():
		return l, invalid("%s shows the host what the guest does; it is not for a confidential guest", debugParameter)
	}
	return l, nil
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("kernel command line: "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}
