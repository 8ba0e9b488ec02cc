// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c goes on with a checksum as ext4 does: the register as it is, where Go's package inverts it before and after.
func crc32c(crc uint32, b []byte) uint32 { return ^crc32.Update(^crc, castagnoli, b) }

// crc32cOf goes on with a checksum over numbers.
func crc32cOf(crc uint32, numbers ...uint32) uint32 {
	for _, n := range numbers {
		crc = crc32c(crc, binary.LittleEndian.AppendUint32(nil, n))
	}
	return crc
}

// encode turns a structure of fixed size into its bytes on the disk.
func encode(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic(err) // a structure of this package that has no fixed size
	}
	return b
}
