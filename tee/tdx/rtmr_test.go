// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/firmware"
)

// starts compares digests with the beginnings that are published of them.
func starts(t *testing.T, events []Event, want ...string) {
	t.Helper()
	require.Len(t, events, len(want))
	for n, e := range events {
		require.Equal(t, want[n], e.Digest.String()[:len(want[n])], e.What)
	}
}

func TestEventsHavePublishedDigests(t *testing.T) {
	starts(t, secureBootVariables(), "9dc3a1f8", "6f2e3cbc", "d607c0ef", "08a74f89", "18cc6e01")
	starts(t, []Event{separator()}, "394341b7182cd227c5c6b07e")
	starts(t, bootOptions(), "1dd6f7b457ad", "23ada07f5261")
	events, err := rtmr1(profile{wholeKernel: true}, testPE(nil))
	require.NoError(t, err)
	starts(t, events[1:], "77a0dab2", "394341b7182c", "214b0bef", "0a2e01c8")
	require.Equal(t, "kernel", events[0].What)
	_, err = rtmr1(profile{}, testPE(nil))
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}

func TestExtend(t *testing.T) {
	require.Equal(t, Digest{}, Extend())
	a, b := event("a", []byte("a")), event("b", []byte("b"))
	first := sum(make([]byte, DigestSize), a.Digest[:])
	require.Equal(t, first, Extend(a))
	require.Equal(t, sum(first[:], b.Digest[:]), Extend(a, b))
	require.NotEqual(t, Extend(a, b), Extend(b, a))
}

func TestRTMR2(t *testing.T) {
	initrd := []byte("initrd")
	for _, tt := range []struct {
		name    string
		profile profile
		initrd  []byte
		text    string
	}{
		{"older edk2", profile{initrd: initrdBehind}, initrd, "quiet panic=-1 initrd=initrd\x00"},
		{"newer edk2", profile{initrd: initrdInFront}, initrd, "initrd=initrd quiet panic=-1\x00"},
		{"no initrd", profile{}, nil, "quiet panic=-1\x00"},
	} {
		events, err := rtmr2(tt.profile, "quiet panic=-1", tt.initrd)
		require.NoError(t, err, tt.name)
		var wide []byte
		for _, c := range []byte(tt.text) {
			wide = append(wide, c, 0)
		}
		want := []Event{{"parameters", sum(wide)}}
		if tt.initrd != nil {
			want = append(want, Event{"initrd", sum(initrd)})
		}
		require.Equal(t, want, events, tt.name)
	}
	_, err := rtmr2(profile{}, "quiet", initrd)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	for _, bad := range []string{"a\x00b", "a=ä", "a\x7f"} {
		_, err := rtmr2(profile{initrd: initrdBehind}, bad, initrd)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%q", bad)
	}
}

func testACPI(cpus int) *ACPI {
	table := func(name string, body []byte) []byte {
		b := make([]byte, tableHeader, tableHeader+len(body))
		copy(b, name)
		b[4], b[5] = byte(tableHeader+len(body)), byte((tableHeader+len(body))>>8)
		return append(b, body...)
	}
	facs := make([]byte, 64)
	copy(facs, "FACS")
	facs[4] = 64
	madt := make([]byte, madtEntriesAt-tableHeader)
	for n := range cpus {
		madt = append(madt, localAPIC, 8, byte(n), byte(n), 1, 0, 0, 0)
	}
	madt = append(madt, localAPIC, 8, 9, 9, 0, 0, 0, 0)                            // may be plugged in later
	madt = append(madt, 1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0)                 // I/O APIC
	madt = append(madt, localX2APIC, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) // disabled
	tables := append(facs, table("DSDT", []byte{1, 2, 3})...)
	tables = append(tables, table("APIC", madt)...)
	return &ACPI{
		Loader: make([]byte, 3*loaderCommand),
		RSDP:   append([]byte("RSD PTR "), make([]byte, 12)...),
		Tables: append(tables, make([]byte, 512)...),
	}
}

func TestRTMR0(t *testing.T) {
	volume := bytes.Repeat([]byte{0xff}, 2*firmware.PageSize)
	fw := &image{raw: volume, parsed: &firmware.Image{TDX: []firmware.TDXSection{
		{RawSize: uint32(len(volume)), MemAddress: 0xffc00000, MemSize: uint64(len(volume)), Type: firmware.TDXConfiguration},
		{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
	}}}
	known := profile{measures: true, acpi: true, initrd: initrdBehind}
	acpi := testACPI(1)
	events, err := rtmr0(fw, known, 1<<30, acpi)
	require.NoError(t, err)
	hob, err := handOff(fw.parsed.TDX, 1<<30)
	require.NoError(t, err)
	require.Equal(t, sum(hob), events[0].Digest)
	require.Equal(t, sum(volume), events[1].Digest)
	starts(t, events[2:8], "9dc3a1f8", "6f2e3cbc", "d607c0ef", "08a74f89", "18cc6e01", "394341b7182c")
	require.Equal(t, []Digest{sum(acpi.Loader), sum(acpi.RSDP), sum(acpi.Tables)},
		[]Digest{events[8].Digest, events[9].Digest, events[10].Digest})
	starts(t, events[11:], "1dd6f7b457ad", "23ada07f5261")

	two := *fw
	two.parsed = &firmware.Image{TDX: append(fw.parsed.TDX[:1:1], fw.parsed.TDX...)}
	keys := *fw
	keys.raw = bytes.Clone(volume)
	copy(keys.raw[volumeHeaderSize+storeHeaderSize:], "\xaa\x55")
	newer, older, secure := known, known, known
	newer.fwcfg, older.acpi, secure.secureBoot = true, false, true
	for name, call := range map[string]func() ([]Event, error){
		"SMBIOS":       func() ([]Event, error) { return rtmr0(fw, newer, 1<<30, acpi) },
		"built with":   func() ([]Event, error) { return rtmr0(fw, secure, 1<<30, acpi) },
		"in place of":  func() ([]Event, error) { return rtmr0(fw, older, 1<<30, acpi) },
		"not given":    func() ([]Event, error) { return rtmr0(fw, known, 1<<30, nil) },
		"not one":      func() ([]Event, error) { return rtmr0(&two, known, 1<<30, acpi) },
		"Secure Boot)": func() ([]Event, error) { return rtmr0(&keys, known, 1<<30, acpi) },
	} {
		events, err := call()
		require.ErrorIs(t, err, errdefs.ErrNotImplemented, name)
		require.ErrorContains(t, err, name)
		require.Nil(t, events)
	}
}

func TestACPI(t *testing.T) {
	for _, n := range []int{0, 1, 3, 20} {
		a := testACPI(n)
		got, err := a.cpus()
		require.NoError(t, err)
		require.Equal(t, n, got)
	}
	dir := t.TempDir() + "/acpi"
	require.NoError(t, (*hypervisor.ACPITables)(testACPI(2)).Write(dir))
	got, err := ReadACPI(dir)
	require.NoError(t, err)
	require.Equal(t, testACPI(2), got)

	for name, break1 := range map[string]func(a *ACPI){
		"no commands":     func(a *ACPI) { a.Loader = a.Loader[1:] },
		"RSD PTR":         func(a *ACPI) { a.RSDP = a.RSDP[1:] },
		"no table APIC":   func(a *ACPI) { a.Tables = a.Tables[:80] },
		"cut off":         func(a *ACPI) { i := bytes.Index(a.Tables, []byte("APIC")); a.Tables[i+madtEntriesAt+1] = 0 },
		"no table APIC, ": func(a *ACPI) { a.Tables[64+4] = 3 },
	} {
		a := testACPI(2)
		break1(a)
		require.NoError(t, (*hypervisor.ACPITables)(a).Write(dir))
		_, err := ReadACPI(dir)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
		require.ErrorContains(t, err, name)
	}
	require.NoError(t, os.Remove(dir+"/rsdp"))
	_, err = ReadACPI(dir)
	require.ErrorIs(t, err, os.ErrNotExist)
}
