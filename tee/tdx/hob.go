// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Hand-off blocks: UEFI Platform Initialization Specification, volume 3, chapter 5.
const (
	hobHandOff           = 1
	hobResource          = 3
	hobHandOffSize       = 56
	hobResourceSize      = 48
	hobEndSize           = 8
	hobVersion           = 9
	hobMemory            = 0
	hobUnaccepted        = 7
	hobResourceAttribute = 7 // present, initialized, tested
)

// Guest memory of QEMU's q35 machine: below 4 GiB there is all of it, up to lowMemoryMax; with more than that only lowMemory.
const (
	lowMemoryMax  = 0xb0000000
	lowMemory     = 0x80000000
	highMemoryAt  = 0x100000000
	maxHOBSection = 64
)

type memoryRange struct {
	start, end uint64
	kind       uint32
}

// handOff is what the firmware measures of the hand-off block that QEMU writes into the section TD_HOB: the header and
// one descriptor for each range of memory. The block's end is counted in the header but is not measured.
func handOff(sections []firmware.TDXSection, memory uint64) ([]byte, error) {
	base, ranges, err := memoryMap(sections, memory)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	size := hobHandOffSize + len(ranges)*hobResourceSize
	b := make([]byte, 0, size)
	b = le.AppendUint16(b, hobHandOff)
	b = le.AppendUint16(b, hobHandOffSize)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, hobVersion)
	b = append(b, make([]byte, 48-len(b))...) // boot mode and four addresses
	b = le.AppendUint64(b, base+uint64(size)+hobEndSize)
	for _, r := range ranges {
		b = le.AppendUint16(b, hobResource)
		b = le.AppendUint16(b, hobResourceSize)
		b = append(b, make([]byte, 4+16)...) // reserved, owner
		b = le.AppendUint32(b, r.kind)
		b = le.AppendUint32(b, hobResourceAttribute)
		b = le.AppendUint64(b, r.start)
		b = le.AppendUint64(b, r.end-r.start)
	}
	return b, nil
}

// memoryMap splits the VM's memory into what the VMM adds before the start and what the guest has to accept.
func memoryMap(sections []firmware.TDXSection, memory uint64) (base uint64, out []memoryRange, err error) {
	var added []memoryRange
	handOffs := 0
	for _, s := range sections {
		switch s.Type {
		case firmware.TDXHandOff:
			base = s.MemAddress
			handOffs++
		case firmware.TDXTemporaryMemory:
		default:
			continue
		}
		added = append(added, memoryRange{s.MemAddress, s.MemAddress + s.MemSize, hobMemory})
	}
	if handOffs != 1 || len(added) > maxHOBSection {
		return 0, nil, fmt.Errorf("the firmware has %d sections TD_HOB and %d of temporary memory, want one and at most %d: %w",
			handOffs, len(added)-handOffs, maxHOBSection, errdefs.ErrInvalidArgument)
	}
	slices.SortFunc(added, func(a, b memoryRange) int { return cmp.Compare(a.start, b.start) })
	low := memory
	if memory >= lowMemoryMax {
		low = lowMemory
	}
	at := uint64(0)
	for _, r := range added {
		if r.start < at || r.end > low {
			return 0, nil, fmt.Errorf("the firmware wants %#x to %#x, which a VM with %d bytes of memory does not have: %w",
				r.start, r.end, memory, errdefs.ErrInvalidArgument)
		}
		if at < r.start {
			out = append(out, memoryRange{at, r.start, hobUnaccepted})
		}
		out = append(out, r)
		at = r.end
	}
	if at < low {
		out = append(out, memoryRange{at, low, hobUnaccepted})
	}
	if memory > low {
		out = append(out, memoryRange{highMemoryAt, highMemoryAt + memory - low, hobUnaccepted})
	}
	return base, out, nil
}
