// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/cloister-project/cloister/tee/firmware"
)

// HashTableSize of a hash table in the guest's memory, in bytes, with its padding.
const HashTableSize = 176

// Hashes of what a VM boots, SHA-256: what firmware with a verifier compares with the files that QEMU hands it.
type Hashes struct {
	// Parameters is the hash of the kernel command line with the NUL behind it (HashParameters).
	Parameters [sha256.Size]byte
	// Initrd is the hash of the whole file; that of nothing where there is none.
	Initrd [sha256.Size]byte
	// Kernel is the hash of the whole file, set-up header included, as it is on disk.
	Kernel [sha256.Size]byte
}

// HashParameters hashes a kernel command line as QEMU does.
func HashParameters(commandLine string) [sha256.Size]byte {
	return sha256.Sum256(append([]byte(commandLine), 0))
}

var (
	guidHashes     = firmware.MustGUID("9438d606-4f22-4cc9-b479-a793d411fd21")
	guidParameters = firmware.MustGUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
	guidInitrd     = firmware.MustGUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
	guidKernel     = firmware.MustGUID("4de79437-abd2-427f-b835-d5b172d2045b")
)

// Table is the hash table as QEMU writes it: a header and three entries, each GUID, le16 length of the whole, content;
// then zeros up to a multiple of 16 (QEMU target/i386/sev.c, PaddedSevHashTable; edk2 OvmfPkg/AmdSev).
func (h Hashes) Table() [HashTableSize]byte {
	const (
		header = 16 + 2
		entry  = header + sha256.Size
		used   = header + 3*entry
	)
	b := make([]byte, 0, HashTableSize)
	add := func(guid firmware.GUID, length int, content []byte) {
		b = append(b, guid[:]...)
		b = binary.LittleEndian.AppendUint16(b, uint16(length))
		b = append(b, content...)
	}
	add(guidHashes, used, nil)
	add(guidParameters, entry, h.Parameters[:])
	add(guidInitrd, entry, h.Initrd[:])
	add(guidKernel, entry, h.Kernel[:])
	var table [HashTableSize]byte
	copy(table[:], b)
	return table
}
