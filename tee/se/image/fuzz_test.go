// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/ecdh"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// smallImage is a sound image of few pages with one slot: its header is on page 0x14000.
func smallImage(t testing.TB) []byte {
	return testImage(t, func(c *BuildConfig) {
		c.Sources.Kernel = c.Sources.Kernel[:kernelLineSizeAt+8]
		c.Sources.Initrd = nil
		c.HostKeys = []*ecdh.PublicKey{newHost(t, 1).PublicKey()}
	}).Bytes()
}

func FuzzInspect(f *testing.F) {
	b := smallImage(f)
	// The bytes that are looked at: mark, header, IPIB. The rest of the image stays as it is.
	list := len(b) - len(marshalIPIB(0, 0, make([]place, 3)))
	header := b[headerFloor : headerFloor+fixedSize+hostkey.SlotSize]
	f.Add(b[metaAddress:metaAddress+metaSize], header, b[list:])
	f.Add([]byte{}, header, []byte{})
	f.Add(b[metaAddress:metaAddress+metaSize], []byte("IBMSecEx"), b[list:list+ipibFixed])
	f.Fuzz(func(t *testing.T, mark, header, ipib []byte) {
		img, ok := patched(b[:list], mark, header, ipib)
		if !ok {
			t.Skip("the parts are longer than their places: no such image is made")
		}
		info, err := Inspect(bytes.NewReader(img), int64(len(img)))
		if err != nil {
			return
		}
		require.Equal(t, int64(len(img)), info.Size)
		require.NotEmpty(t, info.HostKeyHashes)
		end := uint64(0)
		for _, c := range info.Components {
			require.True(t, c.Address >= end && c.Address+c.Size <= uint64(len(img)) && c.Size > 0)
			end = c.Address + c.Size
		}
	})
}

// FuzzOpen changes the list of components, which nothing but the header's digests protects.
func FuzzOpen(f *testing.F) {
	b := smallImage(f)
	list := len(b) - len(marshalIPIB(0, 0, make([]place, 3)))
	mark, header := b[metaAddress:metaAddress+metaSize], b[headerFloor:headerFloor+fixedSize+hostkey.SlotSize]
	f.Add(b[list:])
	f.Add(b[list : list+ipibFixed])
	host := newHost(f, 1)
	f.Fuzz(func(t *testing.T, ipib []byte) {
		img, ok := patched(b[:list], mark, header, ipib)
		if !ok {
			t.Skip("the list is longer than its place: no such image is made")
		}
		u, err := open(img, host)
		if err != nil {
			return
		}
		require.Contains(t, u.Parameters, "cloister.tee=se")
		require.Equal(t, testSources().Kernel[:kernelLineSizeAt+8], u.Kernel)
	})
}

func patched(image, mark, header, ipib []byte) ([]byte, bool) {
	if len(mark) > metaSize || len(header) > maxHeaderSize || len(ipib) > ipibMax {
		return nil, false
	}
	img := bytes.Clone(image)
	clear(img[metaAddress : metaAddress+metaSize])
	copy(img[metaAddress:], mark)
	copy(img[headerFloor:], header)
	return append(img, ipib...), true
}

func FuzzParseHeader(f *testing.F) {
	b := smallImage(f)
	f.Add(b[headerFloor : headerFloor+fixedSize+80])
	f.Add(b[headerFloor : headerFloor+fixedSize])
	f.Add([]byte("IBMSecEx"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, size, err := ParseHeader(b)
		if err != nil {
			return
		}
		require.Equal(t, b[:size], h.Marshal(), "what is parsed is all that is there")
	})
}

func FuzzFindArguments(f *testing.F) {
	args := stage3bArguments{kernel: blob{0x15000, 1}, parameters: blob{0x16000, 2}, initrd: blob{0x17000, 3}}
	f.Add(append([]byte("code"), args.marshal()...))
	f.Add(append(args.marshal(), make([]byte, 100)...))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := findArguments(b); err == nil {
			require.True(t, bytes.Contains(b, a.marshal()))
		}
	})
}
