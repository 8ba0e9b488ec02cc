// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Event logs and registers that owners of TDs published. The digests that depend on their firmware, machine and kernel are
// taken as they are; all others, and the order, are computed here.

func published(t *testing.T, what, text string) Event {
	t.Helper()
	e := Event{What: what}
	n, err := hex.Decode(e.Digest[:], []byte(text))
	require.NoError(t, err)
	require.Equal(t, DigestSize, n)
	return e
}

// publishedSections are those of the firmware of these TDs that matter for the hand-off block.
func publishedSections() []firmware.TDXSection {
	return []firmware.TDXSection{
		{MemAddress: 0x811000, MemSize: 0xf000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x80b000, MemSize: 0x2000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
		{MemAddress: 0x800000, MemSize: 0x6000, Type: firmware.TDXTemporaryMemory},
	}
}

func TestHandOffOfPublishedTDs(t *testing.T) {
	for memory, want := range map[uint64]string{
		2 << 30:  "0e35f1b315ba6c912cf791e5c79dd9d3a2b8704516aa27d4e5aa78fb09ede04aef2bbd02ac7a8734c48562b9c26ba35d",
		4 << 30:  "02a008e63d55a77823c04a5513a5810d4e592dc41bf2596267c09eae5d4b4e3b329ae614973fb192297d8833d37a08fd",
		64 << 30: "519245d8b6b54b48b57143e6647d41e5e6f3b4ef10a73c95be4d9a9c0f54115b707e7af5e38f7be6852229b18573690d",
	} {
		hob, err := handOff(publishedSections(), memory)
		require.NoError(t, err)
		require.Equal(t, want, sum(hob).String(), "%d bytes of memory", memory)
	}
}

func TestRegistersOfAPublishedTD(t *testing.T) {
	hob, err := handOff(publishedSections(), 2<<30)
	require.NoError(t, err)
	zero := []Event{
		event("TD hand-off block", hob),
		published(t, "configuration volume", "344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790"),
	}
	zero = append(append(zero, secureBootVariables()...), separator(),
		published(t, "table-loader", "68cd79315e70aecd4afe7c1b23a5ed7b3b8e51a477e1739f111b3156def86bbc56ebf239dcd4591bc7a9fff90023f481"),
		published(t, "rsdp", "6bc203b3843388cc4918459c3f5c6d1300a796fb594781b7ecfaa3ae7456975f095bfcc1156c9f2d25e8b8bc1b520f66"),
		published(t, "tables", "ec9e8622a100c399d71062a945f95d8e4cdb7294e8b1c6d17a6a8d37b5084444000a78b007ef533f290243421256d25c"))
	zero = append(zero, bootOptions()...)
	require.Equal(t, "85e0855a6384fa1c8a6ab36d0dcbfaa11a5753e5a070c08218ae5fe872fcb86967fd2449c29e22e59dc9fec998cb6547",
		Extend(zero...).String())

	one, err := rtmr1(profile{wholeKernel: true}, testPE(nil))
	require.NoError(t, err)
	one[0] = published(t, "kernel", "f51c5215e1ae1e5202fb0a710248e13c2bf2824b7f0b2a1675f63e9fd37befb93fbb97a4f8630879168b76aee3b198e2")
	require.Equal(t, "4a7db64a609c77e85f603c23e9a9fd03bfd9e6b52ce527f774a598e66d58386026cea79b2aea13b81a0b70cfacdec0ca",
		Extend(one...).String())

	require.Equal(t, "8a4fe048fea22663152ef128853caa5c033cbe66baf32ba1ff7f6b1afc1624c279f50a4cbc522a735ca6f69551e61ef2", Extend(
		published(t, "parameters", "a68ac6d65dd62f392826c2ae44f6846363ced3418c96574b3e168de9205c8553b8198c3b9d206bc432d70a923c25b098"),
		published(t, "initrd", "21a1d39f7395e15c35b91dacf14714cf2e9ead77e69f076ce164798272c1838312b2d82b3307b91929a4d7dbc6f1e48b"),
	).String())
}
