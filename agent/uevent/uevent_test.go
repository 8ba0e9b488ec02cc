// SPDX-License-Identifier: Apache-2.0

package uevent

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	msg := "add@/devices/pci0000:00/block/sda\x00ACTION=add\x00DEVPATH=/devices/x\x00SUBSYSTEM=block\x00SEQNUM=1\x00"
	require.True(t, parse([]byte(msg), "block"))
	require.False(t, parse([]byte(msg), "net"))
	require.False(t, parse([]byte(strings.Replace(msg, "add@", "remove@", 1)), "block"))
	require.False(t, parse([]byte("add@/x"), "block"))
	require.False(t, parse(nil, "block"))
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("add@/x\x00SUBSYSTEM=block\x00"))
	f.Fuzz(func(t *testing.T, msg []byte) { _ = parse(msg, "block") })
}
