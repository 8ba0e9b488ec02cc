// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// memory is the guest's memory as SET_MEM_TABLE described it. It is immutable; a new table is a new memory.
type memory struct {
	regions []region
}

type region struct {
	guestAddr uint64
	userAddr  uint64
	data      []byte // the region
	mapping   []byte // what is mapped: the file from its start to the end of the region
}

// mapMemory maps the regions and closes no fd. Every file must be sealed against shrinking, else its owner could make
// an access to the mapping kill this process.
func mapMemory(specs []regionSpec, fds []int) (_ *memory, err error) {
	m := &memory{}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.unmap())
		}
	}()
	for i, s := range specs {
		var st unix.Stat_t
		if err := unix.Fstat(fds[i], &st); err != nil {
			return nil, fmt.Errorf("memory region %d: fstat: %w", i, err)
		}
		end := s.fileOffset + s.size
		if st.Size < 0 || end > uint64(st.Size) {
			return nil, fmt.Errorf("memory region %d ends at %d in a file of %d bytes", i, end, st.Size)
		}
		seals, err := unix.FcntlInt(uintptr(fds[i]), unix.F_GET_SEALS, 0)
		if err != nil {
			return nil, fmt.Errorf("memory region %d is no memory file (%w): "+
				"the VM's memory must be a memory-backend-memfd with share=on", i, err)
		}
		if seals&unix.F_SEAL_SHRINK == 0 {
			return nil, fmt.Errorf("memory region %d is not sealed against shrinking (seals %#x): "+
				"the VM's memory-backend-memfd must have seal=on, the default", i, seals)
		}
		// From the start of the file, since an offset in huge pages would have to be aligned to those. Address space
		// is all that this costs.
		b, err := unix.Mmap(fds[i], 0, int(end), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
		if err != nil {
			return nil, fmt.Errorf("memory region %d: mmap of %d bytes: %w", i, end, err)
		}
		m.regions = append(m.regions, region{
			guestAddr: s.guestAddr, userAddr: s.userAddr, data: b[s.fileOffset:end:end], mapping: b,
		})
		// The guest's memory has no place in a core dump of this process.
		_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	}
	return m, nil
}

// unmap ends every use of the memory; the caller has made sure that there is none (both queue locks).
func (m *memory) unmap() error {
	if m == nil {
		return nil
	}
	var errs []error
	for i := range m.regions {
		errs = append(errs, unix.Munmap(m.regions[i].mapping))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// trim gives back the page table entries, so that pages of the guest which were touched once do not count as resident
// memory of this process for ever. The content stays: the mapping is shared.
func (m *memory) trim() {
	for i := range m.regions {
		_ = unix.Madvise(m.regions[i].mapping, unix.MADV_DONTNEED)
	}
}

// guest returns the bytes from a guest-physical address on: at most n, fewer where the region ends, nil where nothing is.
func (m *memory) guest(addr uint64, n uint32) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if off := addr - r.guestAddr; addr >= r.guestAddr && off < uint64(len(r.data)) {
			end := min(off+uint64(n), uint64(len(r.data)))
			return r.data[off:end:end]
		}
	}
	return nil
}

// user returns exactly n bytes at an address of QEMU's, or nil.
func (m *memory) user(addr uint64, n int) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if off := addr - r.userAddr; addr >= r.userAddr && off < uint64(len(r.data)) {
			if uint64(len(r.data))-off < uint64(n) {
				return nil
			}
			return r.data[off : off+uint64(n) : off+uint64(n)]
		}
	}
	return nil
}
