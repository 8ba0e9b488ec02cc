// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// Limits of an image, far above what OVMF builds have.
const (
	// MaxSize of an image in bytes; the largest OVMF builds have 8 MiB.
	MaxSize = 16 << 20
	// PageSize by which images and their sections are measured.
	PageSize = 4096

	maxTable    = 4096
	maxSections = 64
	// maxMeasured bounds the guest memory that the sections of one metadata cover, and with it the time of a measurement.
	maxMeasured = 256 << 20
	// fourGiB is where an image ends in the guest's memory.
	fourGiB = 1 << 32

	resetVector = 32
	entryTail   = 2 + 16
)

// Image is what an image says of itself.
type Image struct {
	// Size in bytes, a multiple of PageSize. The image lies at the end of the guest's first 4 GiB.
	Size uint64
	// Entries of the table, in the order of reading: the last one first.
	Entries []Entry
	// HashTable is the place in the guest's memory where the firmware looks for the hashes of kernel, initrd and
	// parameters; nil: it does not.
	HashTable *Area
	// ResetEIP is where further virtual CPUs start under SEV-ES and SEV-SNP; valid with HasReset.
	ResetEIP uint32
	HasReset bool
	// SNP are the sections of the SNP metadata in the table's order; nil: there is none.
	SNP []SNPSection
	// TDX are the sections of the TDX metadata in the table's order; nil: there is none.
	TDX []TDXSection
}

// Entry of the table.
type Entry struct {
	GUID GUID
	Data []byte
}

// Area of guest memory.
type Area struct {
	Base, Size uint32
}

// Base is the guest-physical address of the image's first byte.
func (i *Image) Base() uint64 { return fourGiB - i.Size }

// FixDamaged is what to do about an image that Parse refuses: it is not another build that is needed.
const FixDamaged = "the file is damaged, or it is no firmware image: install it again, or correct the path"

// Error says what is wrong with a firmware image, and what to do.
type Error struct {
	Err error
	Fix string
}

// Error is both in a line.
func (e *Error) Error() string { return e.Err.Error() + "; " + e.Fix }

// Unwrap returns what is wrong.
func (e *Error) Unwrap() error { return e.Err }

// Describe takes an error apart into what is wrong and what to do; the latter is empty if it is no *Error.
func Describe(err error) (detail, fix string) {
	var e *Error
	if errors.As(err, &e) {
		return e.Err.Error(), e.Fix
	}
	return err.Error(), ""
}

// Parse reads an image, and of the metadata those that the features (FeatureSNP, FeatureTDX) need: what an image says to
// another platform is not looked at. Without features it reads all. It keeps no reference to the image.
// errdefs.ErrInvalidArgument: it is none that can be measured.
func Parse(image []byte, features ...string) (*Image, error) {
	i, err := parse(image, features)
	if err != nil {
		return nil, fmt.Errorf("the firmware image is malformed: %w", err)
	}
	return i, nil
}

func parse(image []byte, features []string) (*Image, error) {
	switch {
	case len(image) > MaxSize:
		return nil, malformed("it has %d bytes, more than %d", len(image), MaxSize)
	case len(image) < PageSize || len(image)%PageSize != 0:
		return nil, malformed("it has %d bytes, which is no whole number of %d-byte pages", len(image), PageSize)
	}
	i := &Image{Size: uint64(len(image))}
	var err error
	if i.Entries, err = readTable(image); err != nil {
		return nil, err
	}
	readers := []struct {
		guid    GUID
		feature string
		name    string
		size    int
		read    func(data []byte) error
	}{
		{guidHashTable, FeatureSNP, "SEV hash table", 8, i.readHashTable},
		{guidResetBlock, FeatureSNP, "SEV-ES reset block", 4, func(data []byte) error {
			i.ResetEIP, i.HasReset = binary.LittleEndian.Uint32(data), true
			return nil
		}},
		{guidSNP, FeatureSNP, "SNP metadata", 4, func(data []byte) (err error) {
			i.SNP, err = readSNP(image, binary.LittleEndian.Uint32(data))
			return err
		}},
		{guidTDX, FeatureTDX, "TDX metadata", 4, func(data []byte) (err error) {
			i.TDX, err = readTDX(image, binary.LittleEndian.Uint32(data))
			return err
		}},
	}
	for _, r := range readers {
		if len(features) > 0 && !slices.Contains(features, r.feature) {
			continue
		}
		data, ok, err := i.entry(r.guid)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", r.name, err)
		case !ok:
			continue
		case len(data) != r.size:
			return nil, malformed("%s: the table's entry has %d bytes, want %d", r.name, len(data), r.size)
		}
		if err := r.read(data); err != nil {
			return nil, fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return i, nil
}

// entry finds the only entry with that GUID. VMMs take the first they find; two are a contradiction.
func (i *Image) entry(g GUID) (data []byte, ok bool, err error) {
	for _, e := range i.Entries {
		if e.GUID != g {
			continue
		}
		if ok {
			return nil, false, malformed("the table has two entries %s", g)
		}
		data, ok = e.Data, true
	}
	return data, ok, nil
}

// readTable walks the table backwards. An entry is data, le16 length, GUID; the length counts all three, and the footer's
// length counts the whole table.
func readTable(image []byte) ([]Entry, error) {
	end := len(image) - resetVector
	if !bytes.Equal(image[end-16:end], guidFooter[:]) {
		return nil, malformed("it has no table of entries: no %s in front of the last %d bytes; it is no OVMF, or one without support for SEV "+
			"and TDX", guidFooter, resetVector)
	}
	length := int(binary.LittleEndian.Uint16(image[end-entryTail:]))
	if length < entryTail || length > maxTable || length > end {
		return nil, malformed("the table claims to have %d bytes, possible are %d to %d", length, entryTail, min(maxTable, end))
	}
	table := image[end-length : end-entryTail]
	var entries []Entry
	for len(table) > 0 {
		if len(table) < entryTail {
			return nil, malformed("%d bytes are left over at the table's start", len(table))
		}
		var e Entry
		copy(e.GUID[:], table[len(table)-16:])
		n := int(binary.LittleEndian.Uint16(table[len(table)-entryTail:]))
		if n < entryTail || n > len(table) {
			return nil, malformed("the table's entry %s claims to have %d bytes, possible are %d to %d", e.GUID, n, entryTail, len(table))
		}
		e.Data = slices.Clone(table[len(table)-n : len(table)-entryTail])
		entries = append(entries, e)
		table = table[:len(table)-n]
	}
	return entries, nil
}

func (i *Image) readHashTable(data []byte) error {
	a := Area{Base: binary.LittleEndian.Uint32(data), Size: binary.LittleEndian.Uint32(data[4:])}
	switch {
	case a == Area{}:
		// OVMF builds without a place for it carry the entry with zeros.
		return nil
	case a.Base == 0 || a.Size == 0:
		return malformed("base %#x, size %#x: one of them is zero", a.Base, a.Size)
	case uint64(a.Base)+uint64(a.Size) > fourGiB:
		return malformed("base %#x, size %#x reach beyond 4 GiB", a.Base, a.Size)
	}
	i.HashTable = &a
	return nil
}

// metadata cuts a metadata block out of the image: a signature, le32 length of all, le32 version 1, le32 number of
// sections, and the sections. offset counts back from the image's end.
func metadata(image []byte, offset uint32, signature string, section int) ([]byte, error) {
	const header = 16
	if uint64(offset) > uint64(len(image)) || offset < header {
		return nil, malformed("it starts %d bytes before the end of an image of %d bytes", offset, len(image))
	}
	block := image[len(image)-int(offset):]
	if string(block[:4]) != signature {
		return nil, malformed("no %q at %d bytes before the image's end", signature, offset)
	}
	le := binary.LittleEndian
	length, version, count := le.Uint32(block[4:]), le.Uint32(block[8:]), le.Uint32(block[12:])
	switch {
	case version != 1:
		return nil, malformed("version %d; known is version 1", version)
	case count == 0 || count > maxSections:
		return nil, malformed("%d sections, possible are 1 to %d", count, maxSections)
	case uint64(length) != header+uint64(count)*uint64(section):
		return nil, malformed("%d bytes for %d sections, want %d", length, count, header+int(count)*section)
	case uint64(length) > uint64(len(block)):
		return nil, malformed("it reaches %d bytes beyond the image's end", uint64(length)-uint64(len(block)))
	}
	return block[header:length], nil
}

// span is a range of guest memory, first address and size.
type span struct {
	start, size uint64
}

// checkSpans wants whole pages below limit, no overlap, and a sum that can be measured in time. Empty spans are left out:
// builds without a feature carry its section with zeros.
func checkSpans(spans []span, limit uint64) error {
	var total uint64
	for n, s := range spans {
		switch {
		case s.start%PageSize != 0 || s.size%PageSize != 0:
			return malformed("section %d, %#x bytes at %#x, is not made of whole pages", n, s.size, s.start)
		case s.start > limit || s.size > limit-s.start:
			return malformed("section %d, %#x bytes at %#x, reaches beyond %#x", n, s.size, s.start, limit)
		}
		if total += s.size; total > maxMeasured {
			return malformed("the sections cover more than %d MiB of the guest's memory", maxMeasured>>20)
		}
	}
	for n, s := range spans {
		for m, o := range spans[:n] {
			if s.size > 0 && o.size > 0 && s.start < o.start+o.size && o.start < s.start+s.size {
				return malformed("sections %d and %d overlap: %#x bytes at %#x and %#x bytes at %#x", m, n, o.size, o.start, s.size, s.start)
			}
		}
	}
	return nil
}

func malformed(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}
