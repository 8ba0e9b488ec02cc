// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// Places in an image, and limits; bytes.
const (
	// MaxSize bounds an image. Short PSWs reach 2 GiB.
	MaxSize = 1 << 30

	metaAddress    = 0xc000
	metaMagic      = "SeImgLnx"
	metaVersion    = 1
	metaSize       = 28
	stage3aAddress = 0x10000
	stage3aEntry   = 0x11000
	// headerFloor is where tools that know no mark start to look for the header.
	headerFloor = 0x14000
	// searchEnd bounds that search.
	searchEnd = 0x100000
	// legacyIPIB is where images without a mark have their IPIB.
	legacyIPIB = 0x13000

	kernelEntry  = 0x10000
	stage3aArgs  = 24
	stage3bArgs  = 64
	shortPSWBit  = 1 << 51 // bit 12: this is a short PSW
	shortPSWMax  = 1<<31 - 1
	defaultMask  = 0x180000000 // 64-bit addressing
	shortPSWSize = 8
)

// psw is a program status word: mode bits and the address of the next instruction; z/Architecture Principles of
// Operation (SA22-7832), chapter 4.
type psw struct{ mask, address uint64 }

func (p psw) append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, p.mask), p.address)
}

// short is the form at address 0 that a machine starts with.
func (p psw) short() ([shortPSWSize]byte, error) {
	var out [shortPSWSize]byte
	if p.mask&shortPSWMax != 0 || p.mask&shortPSWBit != 0 || p.address > shortPSWMax {
		return out, fmt.Errorf("PSW %016x %016x has no short form: %w", p.mask, p.address, errdefs.ErrInvalidArgument)
	}
	binary.BigEndian.PutUint64(out[:], p.mask|shortPSWBit|p.address)
	return out, nil
}

// meta is the mark at metaAddress.
type meta struct{ header, ipib uint64 }

func (m meta) marshal() []byte {
	b := binary.BigEndian.AppendUint64([]byte(metaMagic), m.header)
	b = binary.BigEndian.AppendUint32(b, metaVersion)
	return binary.BigEndian.AppendUint64(b, m.ipib)
}

// parseMeta returns false if there is no mark.
func parseMeta(b []byte) (m meta, ok bool, err error) {
	if len(b) < metaSize || string(b[:len(metaMagic)]) != metaMagic {
		return meta{}, false, nil
	}
	if v := binary.BigEndian.Uint32(b[16:]); v != metaVersion {
		return meta{}, false, fmt.Errorf("image layout version %d, want %d: %w", v, metaVersion, errdefs.ErrInvalidArgument)
	}
	return meta{header: binary.BigEndian.Uint64(b[8:]), ipib: binary.BigEndian.Uint64(b[20:])}, true, nil
}

// place is a component as the IPIB lists it; Size is a whole number of pages.
type place struct{ prefix, address, size uint64 }

// The IPIB: an IPL parameter block with one part, type 5 (Linux, arch/s390/include/uapi/asm/ipl.h).
const (
	ipibHeaderSize = 8
	ipibFixed      = 136
	ipibEntry      = 24
	ipibVersion    = 1
	ipibTypePV     = 5
	ipibMax        = PageSize
	maxComponents  = (ipibMax - ipibFixed) / ipibEntry
)

// marshalIPIB lists components; header's place and size are for whoever reads the file, stage3a sets them anew.
func marshalIPIB(header, headerSize uint64, places []place) []byte {
	b := make([]byte, ipibFixed, ipibFixed+len(places)*ipibEntry)
	for _, p := range places {
		b = binary.BigEndian.AppendUint64(b, p.prefix)
		b = binary.BigEndian.AppendUint64(b, p.address)
		b = binary.BigEndian.AppendUint64(b, p.size)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)))
	b[7] = ipibVersion
	binary.BigEndian.PutUint32(b[8:], uint32(len(b)-ipibHeaderSize))
	b[12] = ipibTypePV
	b[111] = ipibVersion
	binary.BigEndian.PutUint32(b[116:], uint32(len(places)))
	binary.BigEndian.PutUint64(b[120:], header)
	binary.BigEndian.PutUint64(b[128:], headerSize)
	return b
}

// parseIPIB reads the list of an image of a given size.
func parseIPIB(b []byte, imageSize int64) ([]place, error) {
	fault := func(format string, a ...any) ([]place, error) {
		return nil, fmt.Errorf("IPIB: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if len(b) < ipibFixed {
		return fault("%d bytes are less than the shortest has", len(b))
	}
	n := uint64(binary.BigEndian.Uint32(b[116:]))
	size := uint64(binary.BigEndian.Uint32(b))
	switch {
	case b[7] != ipibVersion || b[12] != ipibTypePV || b[111] != ipibVersion:
		return fault("versions %d and %d, type %d, want 1, 1 and %d", b[7], b[111], b[12], ipibTypePV)
	case n == 0 || n > maxComponents:
		return fault("%d components, want 1 to %d", n, maxComponents)
	case size != ipibFixed+n*ipibEntry || uint64(binary.BigEndian.Uint32(b[8:])) != size-ipibHeaderSize:
		return fault("its size of %d bytes does not go with %d components", size, n)
	case uint64(len(b)) < size:
		return fault("it is cut off after %d of %d bytes", len(b), size)
	}
	var places []place
	for e := b[ipibFixed:size]; len(e) > 0; e = e[ipibEntry:] {
		places = append(places, place{
			prefix: binary.BigEndian.Uint64(e), address: binary.BigEndian.Uint64(e[8:]), size: binary.BigEndian.Uint64(e[16:]),
		})
	}
	return places, checkPlaces(places, uint64(imageSize))
}

// checkPlaces wants whole pages inside the image, in rising order, which is that of the digests.
func checkPlaces(places []place, imageSize uint64) error {
	end := uint64(stage3aEntry)
	for i, p := range places {
		switch {
		case p.address%PageSize != 0 || p.size%PageSize != 0 || p.size == 0:
			return fmt.Errorf("component %d at 0x%x with 0x%x bytes is no whole number of pages: %w", i, p.address, p.size,
				errdefs.ErrInvalidArgument)
		case p.address < end:
			return fmt.Errorf("component %d at 0x%x lies over what is before it: %w", i, p.address, errdefs.ErrInvalidArgument)
		case p.size > imageSize || p.address > imageSize-p.size:
			return fmt.Errorf("component %d at 0x%x with 0x%x bytes reaches past the image's end at 0x%x: %w", i, p.address, p.size, imageSize,
				errdefs.ErrInvalidArgument)
		}
		end = p.address + p.size
	}
	return nil
}

// ComponentKind is what a component is.
type ComponentKind string

// Kinds of components.
const (
	KindKernel     ComponentKind = "kernel"
	KindInitrd     ComponentKind = "initrd"
	KindParameters ComponentKind = "parameters"
	KindStage3b    ComponentKind = "stage3b"
	KindUnknown    ComponentKind = "unknown"
)

// The first two bytes of a component's tweak prefix say what it is: in the current layout, and in the older one without
// a mark.
var (
	prefixKinds       = map[uint64]ComponentKind{40: KindKernel, 50: KindInitrd, 60: KindParameters, 70: KindStage3b}
	legacyPrefixKinds = map[uint64]ComponentKind{0: KindKernel, 1: KindParameters, 2: KindInitrd, 3: KindStage3b}
)

const prefixKindShift = 48

func kindOf(prefix uint64, kinds map[uint64]ComponentKind) ComponentKind {
	if k, ok := kinds[prefix>>prefixKindShift]; ok {
		return k
	}
	return KindUnknown
}

// prefixOf is the reverse, for the current layout.
func prefixOf(kind ComponentKind, random [6]byte) uint64 {
	for number, k := range prefixKinds {
		if k == kind {
			return number<<prefixKindShift | binary.BigEndian.Uint64(append([]byte{0, 0}, random[:]...))
		}
	}
	return 0
}

// blob is a place and a size without padding, as stage3b is told.
type blob struct{ address, size uint64 }

// stage3bArguments stand at the end of stage3b.
type stage3bArguments struct{ kernel, parameters, initrd blob }

func (a stage3bArguments) marshal() []byte {
	var b []byte
	for _, x := range []blob{a.kernel, a.parameters, a.initrd} {
		b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, x.address), x.size)
	}
	return psw{defaultMask, kernelEntry}.append(b)
}

var errNoArguments = errors.New("stage3b has no arguments at its end")

// findArguments looks for the arguments at the end of a stage3b that is padded with zeros. They end with a PSW that is
// never all zero.
func findArguments(stage3b []byte) (stage3bArguments, error) {
	want := psw{defaultMask, kernelEntry}.append(nil)
	end := len(stage3b)
	// The last byte that is not zero is in the PSW's address 0x10000, two bytes before its end.
	for end > 0 && stage3b[end-1] == 0 {
		end--
	}
	end += 2
	if end < stage3bArgs || end > len(stage3b) || !slices.Equal(stage3b[end-len(want):end], want) {
		return stage3bArguments{}, fmt.Errorf("%w (%w)", errNoArguments, errdefs.ErrInvalidArgument)
	}
	b := stage3b[end-stage3bArgs:]
	read := func(off int) blob {
		return blob{binary.BigEndian.Uint64(b[off:]), binary.BigEndian.Uint64(b[off+8:])}
	}
	return stage3bArguments{kernel: read(0), parameters: read(16), initrd: read(32)}, nil
}

func roundUp(n uint64) uint64 { return (n + PageSize - 1) &^ (PageSize - 1) }
