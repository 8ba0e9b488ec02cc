// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/initdata"
)

// sealedParameters is the command line that goes into the image: the owner's, the platform's name, initdata's binding.
func sealedParameters(platform tee.Name, given string, document []byte, max int) (string, error) {
	if platform != tee.SE && platform != tee.Sample {
		return "", fmt.Errorf("a Secure Execution image cannot be for platform %q: %w", platform, errdefs.ErrInvalidArgument)
	}
	if i := strings.IndexFunc(given, func(r rune) bool { return r < ' ' || r > '~' }); i >= 0 {
		return "", fmt.Errorf("the kernel's command line has a character that is not printable ASCII at %d: %w", i, errdefs.ErrInvalidArgument)
	}
	var faults, words []string
	for _, w := range strings.Fields(given) {
		// The kernel takes quotes off; the agent refuses these words with quotes.
		name, value, _ := strings.Cut(strings.ReplaceAll(w, `"`, ""), "=")
		switch {
		case name == wire.ParamTEE && value != string(platform):
			faults = append(faults, fmt.Sprintf("%s names another platform than %s, which is what the image is for", w, platform))
		case name == wire.ParamTEE:
			continue // added below
		case name == wire.ParamInitdata:
			faults = append(faults, fmt.Sprintf("%s is computed from the initdata document: give the document instead", w))
		case strings.HasPrefix(name, wire.ParamDebug):
			faults = append(faults, fmt.Sprintf("%s would open the guest to the host", w))
		case strings.Contains(w, wire.ParamTEE), strings.Contains(w, wire.ParamInitdata):
			faults = append(faults, fmt.Sprintf("%s looks like %s or %s and is neither: the guest would refuse to start", w, wire.ParamTEE,
				wire.ParamInitdata))
		}
		words = append(words, w)
	}
	if faults != nil {
		return "", fmt.Errorf("the kernel's command line cannot be sealed: %s: %w", strings.Join(faults, "; "), errdefs.ErrInvalidArgument)
	}
	words = append(words, wire.ParamTEE+"="+string(platform))
	if document != nil {
		d, err := initdata.Parse(document)
		if err != nil {
			return "", err
		}
		words = append(words, wire.ParamInitdata+"="+hex.EncodeToString(initdata.Bind(d.Digest(), abi.BindingSize)))
	}
	line := strings.Join(words, " ")
	if len(line) >= max {
		return "", fmt.Errorf("the kernel's command line has %d characters with what is added to it, this kernel takes %d: %w", len(line), max-1,
			errdefs.ErrInvalidArgument)
	}
	return line, nil
}
