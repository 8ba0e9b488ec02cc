// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
)

// What a guest says of its own end goes into the pod's error: one line, bounded, without control characters.
func FuzzDescribePanic(f *testing.F) {
	for _, seed := range []string{
		`{"action": "poweroff", "info": {"type": "tdx", "error-code": 66, "message": "a\u001b[2J\nb", "gpa": 18446744073709551615}}`,
		`{"action": "poweroff", "info": {"type": "sev", "set": 1, "code": 18}}`,
		`{"info": {"type": "s390", "core": 0, "psw-mask": 1, "psw-addr": 2, "reason": "disabled-wait"}}`,
		`{"info": {"type": "\ud800"}}`, `{"info": 1}`, `[]`, ``, `{`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		line, _ := describePanic(data)
		require.True(t, strings.HasPrefix(line, "the guest reported a panic"))
		require.Less(t, len(line), 1024)
		require.Less(t, strings.IndexFunc(line, unicode.IsControl), 0, "%q", line)
	})
}
