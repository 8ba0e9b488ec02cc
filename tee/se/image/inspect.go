// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Hex are bytes that are shown as lower-case hexadecimal digits.
type Hex []byte

// MarshalText returns the digits.
func (h Hex) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText is the reverse.
func (h *Hex) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

// String returns the digits.
func (h Hex) String() string { return hex.EncodeToString(h) }

// Layouts of images.
const (
	LayoutCurrent = "v1"     // with the mark "SeImgLnx"
	LayoutLegacy  = "legacy" // as the older tool genprotimg wrote it
)

// Info is what an image shows to somebody without a key.
type Info struct {
	// Layout is LayoutCurrent or LayoutLegacy.
	Layout string `json:"layout"`
	// Size of the image in bytes.
	Size int64 `json:"size"`
	// HeaderAddress and HeaderSize in bytes.
	HeaderAddress uint64 `json:"header_address"`
	HeaderSize    int    `json:"header_size"`
	// Tag names the image: nothing sealed in it can change without it.
	Tag Hex `json:"tag"`
	PLD Hex `json:"pld"`
	ALD Hex `json:"ald"`
	TLD Hex `json:"tld"`
	// HostKeyHashes are the machines that can run the image, one for each key slot.
	HostKeyHashes []Hex `json:"host_key_hashes"`
	// PCF are the plaintext control flags; the secret ones are encrypted.
	PCF   PCF    `json:"pcf"`
	Pages uint64 `json:"encrypted_pages"`
	// CustomerKey is the public key of whoever built the image.
	CustomerKey Hex `json:"customer_public_key"`
	// Components as the IPIB lists them, which is not authenticated; empty if a legacy image does not tell.
	Components []Component `json:"components,omitempty"`

	header *Header
	places []place
}

// Component is one encrypted part.
type Component struct {
	Kind    ComponentKind `json:"kind"`
	Address uint64        `json:"address"`
	// Size in bytes, padding included.
	Size uint64 `json:"size"`
	// TweakPrefix is the upper half of its pages' tweaks.
	TweakPrefix Hex `json:"tweak_prefix"`
}

// Header returns the image's header.
func (i *Info) Header() *Header { return i.header }

// ErrNoImage says that a file is no Secure Execution image. It is errdefs.ErrInvalidArgument.
var ErrNoImage = fmt.Errorf("no Secure Execution image: %w", errdefs.ErrInvalidArgument)

// InspectFile inspects a file.
func InspectFile(path string) (*Info, error) {
	// A fifo would block the open.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	info, err := Inspect(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return info, nil
}

// Inspect reads what an image of size bytes shows; of the components it reads nothing. Faults are
// errdefs.ErrInvalidArgument.
func Inspect(r io.ReaderAt, size int64) (*Info, error) {
	if size < headerFloor+fixedSize {
		return nil, fmt.Errorf("%d bytes are too few: %w", size, ErrNoImage)
	}
	if size > MaxSize {
		return nil, fmt.Errorf("an image of %d bytes is over the limit of %d: %w", size, MaxSize, errdefs.ErrInvalidArgument)
	}
	b, err := readAt(r, metaAddress, metaSize, size)
	if err != nil {
		return nil, err
	}
	m, marked, err := parseMeta(b)
	if err != nil {
		return nil, err
	}
	info := &Info{Layout: LayoutCurrent, Size: size}
	kinds := prefixKinds
	if marked {
		if m.header%PageSize != 0 || m.ipib%PageSize != 0 {
			return nil, fmt.Errorf("the mark names header and IPIB at 0x%x and 0x%x, which are no pages: %w", m.header, m.ipib,
				errdefs.ErrInvalidArgument)
		}
	} else {
		info.Layout, kinds = LayoutLegacy, legacyPrefixKinds
		m.ipib = legacyIPIB
		if m.header, err = searchHeader(r, size); err != nil {
			return nil, err
		}
	}
	if err := info.readHeader(r, m.header); err != nil {
		return nil, err
	}
	b, err = readAt(r, m.ipib, ipibMax, size)
	if err == nil {
		info.places, err = parseIPIB(b, size)
	}
	switch {
	case err == nil:
		if err := info.checkOverlap(); err != nil {
			return nil, err
		}
	case marked:
		return nil, err
	}
	for _, p := range info.places {
		prefix := prefixBytes(p.prefix)
		info.Components = append(info.Components, Component{kindOf(p.prefix, kinds), p.address, p.size, prefix[:]})
	}
	return info, nil
}

func prefixBytes(prefix uint64) [8]byte {
	t := pageTweak(prefix, 0)
	return [8]byte(t[:])
}

func (i *Info) readHeader(r io.ReaderAt, at uint64) error {
	b, err := readAt(r, at, maxHeaderSize, i.Size)
	if err != nil {
		return err
	}
	h, n, err := ParseHeader(b)
	if err != nil {
		return err
	}
	i.header = h
	i.HeaderAddress, i.HeaderSize = at, n
	i.Tag, i.PLD, i.ALD, i.TLD = h.Tag[:], h.PLD[:], h.ALD[:], h.TLD[:]
	i.PCF, i.Pages, i.CustomerKey = h.PCF, h.Pages, h.Customer[:]
	for _, hash := range h.HostKeyHashes() {
		i.HostKeyHashes = append(i.HostKeyHashes, hash[:])
	}
	return nil
}

// checkOverlap refuses components in the header's place: decrypting one would change the header under way.
func (i *Info) checkOverlap() error {
	for n, p := range i.places {
		if p.address < i.HeaderAddress+uint64(i.HeaderSize) && i.HeaderAddress < p.address+p.size {
			return fmt.Errorf("component %d at 0x%x lies over the header at 0x%x: %w", n, p.address, i.HeaderAddress, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// searchHeader finds the header of an image without a mark, on a page of its own.
func searchHeader(r io.ReaderAt, size int64) (uint64, error) {
	for at := uint64(headerFloor); at < searchEnd && int64(at)+fixedSize <= size; at += PageSize {
		b, err := readAt(r, at, len(headerMagic), size)
		if err != nil {
			return 0, err
		}
		if string(b) == headerMagic {
			return at, nil
		}
	}
	return 0, fmt.Errorf("neither a mark at 0x%x nor a header from 0x%x on: %w", metaAddress, headerFloor, ErrNoImage)
}

// readAt reads up to n bytes, less at the end of the file.
func readAt(r io.ReaderAt, at uint64, n int, size int64) ([]byte, error) {
	if at >= uint64(size) {
		return nil, fmt.Errorf("0x%x lies past the image's end at 0x%x: %w", at, size, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, min(int64(n), size-int64(at)))
	if m, err := r.ReadAt(b, int64(at)); m < len(b) {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the image ended while it was read: %w", errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
	return b, nil
}
