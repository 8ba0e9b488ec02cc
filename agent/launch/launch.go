// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/tee/abi"
)

// Launch is what the kernel's command line says.
type Launch struct {
	// Platform that the guest was made for; empty for an ordinary VM.
	Platform abi.Platform
	// Debug asks the agent to tell more on the console.
	Debug bool
	// bound is the value of wire.ParamInitdata, abi.BindingSize bytes; nil: there is none.
	bound []byte
}

// Confidential reports whether the rules of a confidential guest hold.
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
		case wire.ParamDebug:
			l.Debug = true
		default:
			// A slip of the pen, or quotes, must not make an ordinary VM of a confidential one.
			if strings.Contains(word, wire.ParamTEE) || strings.Contains(word, wire.ParamInitdata) {
				return l, invalid("%.80q is neither %s=NAME nor %s=HEX", word, wire.ParamTEE, wire.ParamInitdata)
			}
		}
		switch name {
		case wire.ParamTEE:
			// An ordinary VM has no such parameter: none is not a platform here.
			platform, known := abi.ParsePlatform(value)
			if !known || !platform.Confidential() {
				return l, invalid("%s=%.40q: known are %s", name, value, strings.TrimPrefix(abi.KnownPlatforms(), string(abi.None)+", "))
			}
			l.Platform = platform
		case wire.ParamInitdata:
			bound, err := hex.DecodeString(value)
			if err != nil || len(bound) != abi.BindingSize {
				return l, invalid("%s=%.140q is not %d bytes in hex", name, value, abi.BindingSize)
			}
			if len(bytes.Trim(bound, "\x00")) == 0 {
				return l, invalid("%s is zero: leave it out where no initdata is bound", name)
			}
			l.bound = bound
		}
	}
	switch {
	case l.bound != nil && l.Platform != abi.Sample && l.Platform != abi.SE:
		return l, invalid("%s is not for platform %q, whose hardware binds initdata", wire.ParamInitdata, l.Platform)
	case l.Debug && l.Confidential():
		return l, invalid("%s shows the host what the guest does; it is not for a confidential guest", wire.ParamDebug)
	}
	return l, nil
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("kernel command line: "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}
