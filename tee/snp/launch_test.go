// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
)

func ovmf(t *testing.T, variable string) []byte {
	t.Helper()
	raw, _, err := firmware.ReadFile(testFile(t, variable), firmware.MaxSize)
	require.NoError(t, err)
	return raw
}

func testFile(t *testing.T, variable string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		t.Skipf("%s is not set", variable)
	}
	return path
}

// testHashes are of no files that exist.
func testHashes() *Hashes {
	return &Hashes{Parameters: HashParameters("console=ttyS0 quiet"), Initrd: sha256.Sum256([]byte("initrd")),
		Kernel: sha256.Sum256([]byte("kernel"))}
}

func testLaunch() Launch {
	return Launch{Firmware: firmwaretest.SNP().Bytes(), CPUSignature: 0x800f12, GuestFeatures: 1, Hashes: testHashes()}
}

// TestThePublishedDigest: the value was computed by others, with an implementation of their own.
func TestThePublishedDigest(t *testing.T) {
	image := ovmf(t, "CLOISTER_TEST_OVMF")
	const of = "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773"
	if sum := sha256.Sum256(image); hex.EncodeToString(sum[:]) != of {
		t.Skipf("CLOISTER_TEST_OVMF is not the image with SHA-256 %s", of)
	}
	signature, err := CPUSignature("EPYC-v4")
	require.NoError(t, err)
	d, err := Launch{Firmware: image, CPUSignature: signature, GuestFeatures: 1}.Digest(1)
	require.NoError(t, err)
	require.Equal(t, "11570979c77a0adb515761a702527c8b9e11554e730552621d950988613a3a75c6ff1703f540bd22a9beede8fe7a97e3",
		hex.EncodeToString(d[:]))
}

// TestPublishedDigestsWithHashes: values of another implementation, for a kernel and an initrd without content. It starts
// from the digest of a firmware that is not at hand, with the sections of an early AmdSev build (hashes at 0x80fc00), and is
// of a time when that implementation left MXCSR and the x87 control word at zero.
func TestPublishedDigestsWithHashes(t *testing.T) {
	state := func(eip uint32) []byte {
		page := vmsa(eip, 0x800f12, 1)
		clear(page[0x408:0x40c])
		clear(page[0x410:0x412])
		return page
	}
	for _, tt := range []struct {
		firmware, parameters string
		cpus                 int
		want                 string
	}{
		{"cab7e085874b3acfdbe2d96dcaa3125111f00c35c6fc9708464c2ae74bfdb048a198cb9a9ccae0b3e5e1a33f5f249819", "", 1,
			"db06fb267824b1ccb56edbe2a9c2ce88841bca5090dc6dac91d9cd30f3c2c0bf42daccb30d55d6625bfbf0dae5c50c6d"},
		{"edcf6d1c57ce868a167c990f58c8667c698269ef9e0803246419eea914186343054d557e1f17acd93b032c106bc70d25", "console=ttyS0 loglevel=7", 1,
			"f07864303ad8243132029e8110b92805c78d1135a15da75f67abb9a711d78740347f24ee76f603e650ec4adf3611cc1e"},
		{"edcf6d1c57ce868a167c990f58c8667c698269ef9e0803246419eea914186343054d557e1f17acd93b032c106bc70d25", "", 4,
			"1c784beb8c49aa604b7fd57fbc73b36ec53a3f5fb48a2b895ad6cc2ea15d18ee7cc15e3e57c792766b45f944c3e81cfe"},
	} {
		var c launchContext
		_, err := hex.Decode(c.ld[:], []byte(tt.firmware))
		require.NoError(t, err)
		image := &firmware.Image{
			HashTable: &firmware.Area{Base: 0x80fc00, Size: 0x400},
			SNP: []firmware.SNPSection{
				{Base: 0x800000, Size: 0x9000, Type: firmware.SNPMemory},
				{Base: 0x80a000, Size: 0x3000, Type: firmware.SNPMemory},
				{Base: 0x80d000, Size: 0x1000, Type: firmware.SNPSecrets},
				{Base: 0x80e000, Size: 0x1000, Type: firmware.SNPCPUID},
				{Base: 0x80f000, Size: 0x1000, Type: firmware.SNPKernelHashes},
				{Base: 0x810000, Size: 0x10000, Type: firmware.SNPMemory},
			},
		}
		l := Launch{Hashes: &Hashes{Parameters: HashParameters(tt.parameters), Initrd: sha256.Sum256(nil), Kernel: sha256.Sum256(nil)}}
		require.NoError(t, l.sections(&c, image))
		c.vmsa(state(bspEIP))
		for range tt.cpus - 1 {
			c.vmsa(state(0x80b004))
		}
		require.Equal(t, tt.want, hex.EncodeToString(c.ld[:]), "%d CPUs, %q", tt.cpus, tt.parameters)
	}
}

// TestDigestsStayTheSame: a change of these values is a change of what verifiers must expect.
func TestDigestsStayTheSame(t *testing.T) {
	digests, err := testLaunch().Digests(1, 64)
	require.NoError(t, err)
	for cpus, want := range map[int]string{
		1:  "369aef0a857a18c207b5d6eeff8f2ece88fc1d2cb3948c243034e75f533ba2859c6e7e160a016573d198523bc6ae8982",
		2:  "147d0ca4cec6cfa009bbb42bc13c7b48f9c1fb7dc773aaabe9f9515a847385f845568c833eca7018f2df181fd573f51b",
		4:  "13d455505acdceff10445fc54ba9df61bddddd67f0907f7dc33458db345b60b91f0bdb9ed20bbd5d78b678fe6a75b15d",
		64: "d6fee9ee564d5c1217c18abe8d7384445851f6c8e93654e5a87b1adc03de6ecff96c1116b0d00aae190c3770a96f005f",
	} {
		require.Equal(t, want, hex.EncodeToString(digests[cpus-1][:]), "%d virtual CPUs", cpus)
	}
}

// TestEachNumberOfCPUs goes the specification's way once more, page by page, with the state of the further virtual CPUs
// spelled out.
func TestEachNumberOfCPUs(t *testing.T) {
	const signature, features = 0xa00f11, 0x21
	l := testLaunch()
	l.CPUSignature, l.GuestFeatures = signature, features
	all, err := l.Digests(1, 64)
	require.NoError(t, err)
	require.Len(t, all, 64)

	ap := make([]byte, 4096)
	for offset, value := range map[int]string{
		0x00: "0000 9300 ffff0000 0000000000000000", 0x20: "0000 9300 ffff0000 0000000000000000", 0x30: "0000 9300 ffff0000 0000000000000000",
		0x40: "0000 9300 ffff0000 0000000000000000", 0x50: "0000 9300 ffff0000 0000000000000000",
		0x10: "00f0 9b00 ffff0000 0000800000000000", // the reset block says 0x80b004
		0x60: "0000 0000 ffff0000 0000000000000000", 0x70: "0000 8200 ffff0000 0000000000000000",
		0x80: "0000 0000 ffff0000 0000000000000000", 0x90: "0000 8b00 ffff0000 0000000000000000",
		0xd0: "0010000000000000", 0x148: "4000000000000000", 0x158: "1000000000000000", 0x160: "0004000000000000", 0x168: "f00fffff00000000",
		0x170: "0200000000000000", 0x178: "04b0000000000000", 0x268: "0604070006040700", 0x310: "110fa00000000000",
		0x3b0: "2100000000000000", 0x3e8: "0100000000000000", 0x408: "801f0000", 0x410: "7f03",
	} {
		_, err := hex.Decode(ap[offset:], []byte(removeSpaces(value)))
		require.NoError(t, err)
	}
	state := sha512.Sum384(ap)
	want := all[0]
	for n := 1; n <= 64; n++ {
		one, err := l.Digest(n)
		require.NoError(t, err)
		require.Equal(t, want, one, "%d virtual CPUs", n)
		require.Equal(t, want, all[n-1], "%d virtual CPUs", n)

		info := append(append([]byte{}, want[:]...), state[:]...)
		info = binary.LittleEndian.AppendUint16(info, 0x70)
		info = append(info, 2, 0, 0, 0, 0, 0)
		info = binary.LittleEndian.AppendUint64(info, 0xfffffffff000)
		require.Len(t, info, 0x70)
		want = sha512.Sum384(info)
	}

	some, err := l.Digests(3, 5)
	require.NoError(t, err)
	require.Equal(t, all[2:5], some)
}

func removeSpaces(s string) string {
	var b []byte
	for _, c := range []byte(s) {
		if c != ' ' {
			b = append(b, c)
		}
	}
	return string(b)
}

func TestEachInputCounts(t *testing.T) {
	want, err := testLaunch().Digest(2)
	require.NoError(t, err)
	for name, change := range map[string]func(*Launch){
		"firmware":       func(l *Launch) { l.Firmware[0] ^= 1 },
		"CPU":            func(l *Launch) { l.CPUSignature ^= 0x10 },
		"guest features": func(l *Launch) { l.GuestFeatures ^= 0x20 },
		"kernel":         func(l *Launch) { l.Hashes.Kernel[31] ^= 1 },
		"initrd":         func(l *Launch) { l.Hashes.Initrd[0] ^= 1 },
		"parameters":     func(l *Launch) { l.Hashes.Parameters = HashParameters("console=ttyS0 quieu") },
		"hashes":         func(l *Launch) { l.Hashes = nil },
		"section":        func(l *Launch) { s := firmwaretest.SNP(); s.SNP[0].Size += 4096; l.Firmware = s.Bytes() },
		"section's type": func(l *Launch) {
			s := firmwaretest.SNP()
			s.SNP[1].Type, s.SNP[2].Type = s.SNP[2].Type, s.SNP[1].Type
			l.Firmware = s.Bytes()
		},
		"order of sections": func(l *Launch) {
			s := firmwaretest.SNP()
			s.SNP[0], s.SNP[5] = s.SNP[5], s.SNP[0]
			l.Firmware = s.Bytes()
		},
		"place of the table": func(l *Launch) { s := firmwaretest.SNP(); s.HashTable.Base -= 16; l.Firmware = s.Bytes() },
		"reset block":        func(l *Launch) { s := firmwaretest.SNP(); s.ResetEIP += 4; l.Firmware = s.Bytes() },
	} {
		l := testLaunch()
		change(&l)
		got, err := l.Digest(2)
		require.NoError(t, err, name)
		require.NotEqual(t, want, got, name)
	}
}

func TestLaunchesThatCannotBeMeasured(t *testing.T) {
	section := func(change func(*firmwaretest.Image)) func(*Launch) {
		return func(l *Launch) {
			s := firmwaretest.SNP()
			change(&s)
			l.Firmware = s.Bytes()
		}
	}
	for _, tt := range []struct {
		want   string
		change func(*Launch)
	}{
		{"malformed", func(l *Launch) { l.Firmware = l.Firmware[1:] }},
		{"no SNP metadata", section(func(s *firmwaretest.Image) { s.SNP = nil })},
		{"no section KERNEL_HASHES", section(func(s *firmwaretest.Image) { s.SNP = s.SNP[:5] })},
		{"two sections KERNEL_HASHES", section(func(s *firmwaretest.Image) {
			s.SNP = append(s.SNP, firmware.SNPSection{Base: 0x820000, Size: 0x1000, Type: firmware.SNPKernelHashes})
		})},
		{"no entry for a hash table", section(func(s *firmwaretest.Image) { s.HashTable = nil })},
		{"has 175 bytes, want 176", section(func(s *firmwaretest.Image) { s.HashTable.Size = 175 })},
		{"not in its section", section(func(s *firmwaretest.Image) { s.HashTable.Base = 0x80fff0 })},
		{"not in its section", section(func(s *firmwaretest.Image) { s.HashTable.Base = 0x811000 - 175 })},
		{"where further virtual CPUs start", section(func(s *firmwaretest.Image) { s.ResetEIP = 0 })},
		{"type 0x11, which is not known", section(func(s *firmwaretest.Image) { s.SNP[0].Type = 0x11; s.SNP[0].Size = 0x1000 })},
		{"SECRETS, has 0x2000 bytes", section(func(s *firmwaretest.Image) { s.SNP[0].Type = firmware.SNPSecrets })},
		{"is empty, which KVM refuses", section(func(s *firmwaretest.Image) { s.SNP[3].Size = 0 })},
	} {
		l := testLaunch()
		tt.change(&l)
		_, err := l.Digest(2)
		require.ErrorContains(t, err, tt.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	for _, r := range [][2]int{{0, 1}, {2, 1}, {1, MaxCPUs + 1}} {
		_, err := testLaunch().Digests(r[0], r[1])
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%v", r)
	}
}

func TestHashTable(t *testing.T) {
	h := Hashes{}
	for i := range 32 {
		h.Parameters[i], h.Initrd[i], h.Kernel[i] = 0xaa, 0xbb, 0xcc
	}
	table := h.Table()
	repeat := func(digits string) (s string) {
		for range 32 {
			s += digits
		}
		return s
	}
	// GUIDs in their mixed byte order, lengths little-endian: 168 for the whole, 50 for each entry.
	require.Equal(t, "06d63894224fc94cb479a793d411fd21"+"a800"+
		"d82dd09720bd944caa78e7714d36ab2a"+"3200"+repeat("aa")+
		"31f7ba442f3ad74b9af141e29169781d"+"3200"+repeat("bb")+
		"3794e74dd2ab7f42b835d5b172d2045b"+"3200"+repeat("cc")+
		"0000000000000000", hex.EncodeToString(table[:]))
	require.Equal(t, sha256.Sum256([]byte("a b\x00")), HashParameters("a b"))
	require.Equal(t, sha256.Sum256([]byte{0}), HashParameters(""))
}
