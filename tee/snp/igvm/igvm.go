// SPDX-License-Identifier: Apache-2.0

package igvm

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/containerd/errdefs"
)

const (
	// PageSize of every page, in bytes.
	PageSize = 4096
	// MaxSize of a file, in bytes: a firmware image has some MiB.
	MaxSize = 64 << 20
	// maxHeaders bounds the variable headers, in bytes: 32 for each page of the largest file, and some.
	maxHeaders = MaxSize/PageSize*32 + 64<<10
	// maxVPs is as many as SEV-SNP guests have.
	maxVPs = 1024

	fixedHeader = 24
	version1    = 1
	platformSNP = 2
	// optional in a header's type: whoever does not know it may skip it.
	optional = 1 << 31
)

var magic = []byte("IGVM")

// PageType is how a page is put into the guest's memory.
type PageType int

// Page types.
const (
	// Normal pages have content, which is measured.
	Normal PageType = iota
	// Unmeasured pages count with their address alone.
	Unmeasured
	// Secrets and CPUID are filled by the processor and the VMM; they count with their address alone.
	Secrets
	CPUID
)

// Page of the guest's memory.
type Page struct {
	// GPA is the guest physical address, a multiple of PageSize.
	GPA  uint64
	Type PageType
	// Data has PageSize bytes; nil: zeros.
	Data []byte
}

// File is what a file launches.
type File struct {
	// Policy of the guest (SEV-SNP Firmware ABI section 4.3).
	Policy uint64
	// Pages in the order of their addresses, each address once.
	Pages []Page
	// VMSAs are the first states of the virtual CPUs by their numbers, PageSize bytes each: AMD64 Architecture Programmer's
	// Manual volume 2, appendix B, state save area for SEV-ES.
	VMSAs [][]byte
}

// Types of variable headers.
const (
	typePlatform        = 0x1
	typePolicy          = 0x101
	typeParameterArea   = 0x301
	typePage            = 0x302
	typeParameterInsert = 0x303
	typeVP              = 0x304
	typeRequiredMemory  = 0x305
	typeVPCount         = 0x307
	typeIDBlock         = 0x30b
	typeMemoryMap       = 0x30c
	typeCommandLine     = 0x30e
)

// sizes of the known headers' content, in bytes.
var sizes = map[uint32]int{
	typePlatform: 16, typePolicy: 16, typeParameterArea: 16, typePage: 24, typeParameterInsert: 16, typeVP: 20,
	typeRequiredMemory: 24, typeVPCount: 8, typeMemoryMap: 8, typeCommandLine: 8,
}

// Parse reads a file. errdefs.ErrInvalidArgument: it is damaged, is not for SEV-SNP, or has what Cloud Hypervisor does not load.
func Parse(raw []byte) (*File, error) {
	r := reader{raw: raw, vmsas: map[uint16][]byte{}, areas: map[uint32]bool{}}
	if err := r.read(); err != nil {
		return nil, fmt.Errorf("IGVM file: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &r.file, nil
}

// reader is one reading.
type reader struct {
	raw  []byte
	file File
	// mask is SEV-SNP's bit of compatibility masks; 0: not there yet.
	mask      uint32
	hasPolicy bool
	vmsas     map[uint16][]byte
	// areas of parameters by number; true: inserted.
	areas map[uint32]bool
}

func u16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func u32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

func (r *reader) read() error {
	headers, err := r.headers()
	if err != nil {
		return err
	}
	for at := 0; at < len(headers); {
		if len(headers)-at < 8 {
			return fmt.Errorf("%d bytes behind the last header", len(headers)-at)
		}
		kind, length := u32(headers[at:]), int64(u32(headers[at+4:]))
		at += 8
		if length > int64(len(headers)-at) {
			return fmt.Errorf("a header of type %#x has %d bytes, and %d are left", kind, length, len(headers)-at)
		}
		if err := r.header(kind, headers[at:at+int(length)]); err != nil {
			return err
		}
		at += (int(length) + 7) &^ 7
	}
	return r.finish()
}

// headers checks the fixed header and returns the variable ones.
func (r *reader) headers() ([]byte, error) {
	switch {
	case len(r.raw) > MaxSize:
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(r.raw), MaxSize)
	case len(r.raw) < fixedHeader || !bytes.Equal(r.raw[:4], magic):
		return nil, errors.New("it does not begin as one")
	}
	offset, size, total := u32(r.raw[8:]), u32(r.raw[12:]), u32(r.raw[16:])
	switch v := u32(r.raw[4:]); {
	case v != version1:
		return nil, fmt.Errorf("it is of version %d, want %d", v, version1)
	case int64(total) != int64(len(r.raw)):
		return nil, fmt.Errorf("it has %d bytes and says %d", len(r.raw), total)
	case offset != fixedHeader || size > maxHeaders || int64(size) > int64(len(r.raw))-fixedHeader || size%8 != 0:
		return nil, fmt.Errorf("its variable headers are not possible: %d bytes at %d", size, offset)
	}
	end := fixedHeader + int(size)
	sum := crc32.NewIEEE()
	_, _ = sum.Write(r.raw[:20]) // never fails
	_, _ = sum.Write(make([]byte, 4))
	_, _ = sum.Write(r.raw[fixedHeader:end])
	if got := u32(r.raw[20:]); got != sum.Sum32() {
		return nil, fmt.Errorf("its checksum is %#x, want %#x", got, sum.Sum32())
	}
	return r.raw[fixedHeader:end], nil
}

func (r *reader) header(kind uint32, b []byte) error {
	if kind == typeIDBlock {
		return errors.New("it has an ID block, whose keys would be in every report; build it without")
	}
	size, known := sizes[kind]
	switch {
	case !known && kind&optional != 0:
		return nil
	case !known:
		return fmt.Errorf("it has a header of type %#x, which Cloud Hypervisor does not load", kind)
	case len(b) != size:
		return fmt.Errorf("a header of type %#x has %d bytes, want %d", kind, len(b), size)
	case kind != typePlatform && r.mask == 0:
		return fmt.Errorf("a header of type %#x stands before that of SEV-SNP", kind)
	}
	switch kind {
	case typePlatform:
		return r.platform(b)
	case typePolicy:
		return r.policy(b)
	case typePage:
		return r.page(b)
	case typeParameterArea:
		return r.parameterArea(b)
	case typeParameterInsert:
		return r.parameterInsert(b)
	case typeVP:
		return r.vp(b)
	}
	return nil // what a loader looks for, or puts into unmeasured pages
}

func (r *reader) platform(b []byte) error {
	mask := u32(b)
	if b[5] != platformSNP {
		return nil
	}
	if r.mask != 0 || mask == 0 || mask&(mask-1) != 0 {
		return fmt.Errorf("it has two platforms SEV-SNP, or one with the mask %#x", mask)
	}
	r.mask = mask
	return nil
}

func (r *reader) policy(b []byte) error {
	if u32(b[8:])&r.mask == 0 {
		return nil
	}
	if r.hasPolicy {
		return errors.New("it has two guest policies")
	}
	r.file.Policy, r.hasPolicy = u64(b), true
	return nil
}

func (r *reader) page(b []byte) error {
	const (
		flag2MB        = 1 << 0
		flagUnmeasured = 1 << 1
	)
	gpa, offset, flags, kind := u64(b), u32(b[12:]), u32(b[16:]), u16(b[20:])
	if u32(b[8:])&r.mask == 0 {
		return nil
	}
	p := Page{GPA: gpa}
	switch {
	case flags&^(flag2MB|flagUnmeasured) != 0 || u16(b[22:]) != 0:
		return fmt.Errorf("the page at %#x has unknown flags", gpa)
	case flags&flag2MB != 0:
		return fmt.Errorf("the page at %#x has 2 MiB; Cloud Hypervisor loads pages of 4 KiB only", gpa)
	case kind > 2:
		return fmt.Errorf("the page at %#x is of type %d, which Cloud Hypervisor does not load", gpa, kind)
	case kind == 1:
		p.Type = Secrets
	case kind == 2:
		p.Type = CPUID
	case flags&flagUnmeasured != 0:
		p.Type = Unmeasured
	}
	if offset != 0 {
		var err error
		if p.Data, err = r.data(offset); err != nil {
			return fmt.Errorf("the page at %#x: %w", gpa, err)
		}
	}
	r.file.Pages = append(r.file.Pages, p)
	return nil
}

// data is a page of the file's data.
func (r *reader) data(offset uint32) ([]byte, error) {
	first := fixedHeader + int64(u32(r.raw[12:]))
	if int64(offset) < first || int64(offset)+PageSize > int64(len(r.raw)) {
		return nil, fmt.Errorf("its content at %d is not in the file's data", offset)
	}
	return r.raw[offset : int64(offset)+PageSize : int64(offset)+PageSize], nil
}

func (r *reader) parameterArea(b []byte) error {
	number := u32(b[8:])
	if _, there := r.areas[number]; there {
		return fmt.Errorf("it has two areas of parameters %d", number)
	}
	r.areas[number] = false
	return nil
}

// parameterInsert puts an area of parameters into memory. Of an area Cloud Hypervisor launches the first page, unmeasured.
func (r *reader) parameterInsert(b []byte) error {
	if u32(b[8:])&r.mask == 0 {
		return nil
	}
	number := u32(b[12:])
	if inserted, there := r.areas[number]; !there || inserted {
		return fmt.Errorf("the area of parameters %d is not there, or was inserted before", number)
	}
	r.areas[number] = true
	r.file.Pages = append(r.file.Pages, Page{GPA: u64(b), Type: Unmeasured})
	return nil
}

func (r *reader) vp(b []byte) error {
	if u32(b[8:])&r.mask == 0 {
		return nil
	}
	number := u16(b[16:])
	if r.vmsas[number] != nil || number >= maxVPs {
		return fmt.Errorf("the virtual processor %d is there twice, or beyond %d", number, maxVPs)
	}
	data, err := r.data(u32(b[12:]))
	if err != nil {
		return fmt.Errorf("the virtual processor %d: %w", number, err)
	}
	r.vmsas[number] = data
	return nil
}

// finish checks what only the whole file shows.
func (r *reader) finish() error {
	switch {
	case r.mask == 0:
		return errors.New("it is not for SEV-SNP")
	case !r.hasPolicy:
		return errors.New("it has no guest policy; the VMM would choose one")
	case len(r.vmsas) == 0:
		return errors.New("it has no virtual processor")
	}
	for n := range len(r.vmsas) {
		page := r.vmsas[uint16(n)]
		if page == nil {
			return fmt.Errorf("it has %d virtual processors, and none with the number %d", len(r.vmsas), n)
		}
		r.file.VMSAs = append(r.file.VMSAs, page)
	}
	slices.SortFunc(r.file.Pages, func(a, b Page) int { return cmp.Compare(a.GPA, b.GPA) })
	for i, p := range r.file.Pages {
		if p.GPA%PageSize != 0 {
			return fmt.Errorf("the page at %#x is not at a multiple of %d", p.GPA, PageSize)
		}
		if i > 0 && r.file.Pages[i-1].GPA == p.GPA {
			return fmt.Errorf("it has two pages at %#x", p.GPA)
		}
	}
	return nil
}
