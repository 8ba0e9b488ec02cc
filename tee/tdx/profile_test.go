// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestReadProfile(t *testing.T) {
	decoy := append([]byte{0, 0, 0, 2}, lzmaSection[:]...)
	for name, tt := range map[string]struct {
		image []byte
		want  profile
	}{
		"older":           {compress(t, driversOld), profile{measures: true, acpi: true, wholeKernel: true, initrd: initrdBehind}},
		"newer":           {compress(t, driversNew), profile{measures: true, acpi: true, wholeKernel: true, fwcfg: true, initrd: initrdInFront}},
		"no measurements": {compress(t, driversPlain), profile{acpi: true, initrd: initrdBehind}},
		"both texts":      {compress(t, " initrd=initrd\x00initrd=initrd \x00"), profile{}},
		"traces in front": {append([]byte("QEMU FW CFG\x00"), compress(t, driversOld)...),
			profile{measures: true, acpi: true, wholeKernel: true, fwcfg: true, initrd: initrdBehind}},
		"behind a decoy": {append(append(decoy, 4, 0, 1, 0), compress(t, driversOld)...),
			profile{measures: true, acpi: true, wholeKernel: true, initrd: initrdBehind}},
		"traces elsewhere": {append([]byte("ACPI DATA\x00"), compress(t, "nothing")...), profile{}},
	} {
		got, err := readProfile(tt.image)
		require.NoError(t, err, name)
		require.Equal(t, tt.want, got, name)
	}

	good := compress(t, driversOld)
	size := len(lzmaSection) + 4 + 4 + 5
	bomb := bytes.Clone(good)
	binary.LittleEndian.PutUint64(bomb[size:], 1<<40)
	dictionary := bytes.Clone(good)
	binary.LittleEndian.PutUint32(dictionary[size-4:], 1<<31)
	short := bytes.Clone(good)
	binary.LittleEndian.PutUint64(short[size:], 1<<20)
	for name, image := range map[string][]byte{
		"empty":              nil,
		"no section":         []byte("TdTcg2Dxe"),
		"cut":                good[:20],
		"cut in the data":    good[:40],
		"too large inside":   bomb,
		"too much memory":    dictionary,
		"less than promised": short,
	} {
		_, err := readProfile(image)
		require.ErrorIs(t, err, errdefs.ErrNotFound, name)
	}
}

func TestProfilesOfPublicFirmware(t *testing.T) {
	for variable, want := range map[string]profile{
		"CLOISTER_TEST_OVMF":          {secureBoot: true, initrd: initrdBehind},
		"CLOISTER_TEST_OVMF_INTELTDX": {measures: true, acpi: true, fwcfg: true, wholeKernel: true, secureBoot: true, initrd: initrdInFront},
		"CLOISTER_TEST_OVMF_TDX":      {measures: true, acpi: true, wholeKernel: true, initrd: initrdBehind},
	} {
		t.Run(variable, func(t *testing.T) {
			raw, err := os.ReadFile(fileFromEnv(t, variable))
			require.NoError(t, err)
			got, err := readProfile(raw)
			require.NoError(t, err)
			require.Equal(t, want, got)
		})
	}
}

func FuzzReadProfile(f *testing.F) {
	f.Add([]byte{})
	f.Add(compress(f, driversOld))
	f.Add(compress(f, driversNew)[:60])
	f.Fuzz(func(t *testing.T, image []byte) {
		p, err := readProfile(image)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			require.Equal(t, profile{}, p)
		}
	})
}

func FuzzACPI(f *testing.F) {
	f.Add([]byte{})
	f.Add(testACPI(2).Tables)
	f.Add(testACPI(300).Tables[:200])
	f.Fuzz(func(t *testing.T, tables []byte) {
		n, err := (&ACPI{Tables: tables}).cpus()
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		}
		require.LessOrEqual(t, n, len(tables)/8)
	})
}
