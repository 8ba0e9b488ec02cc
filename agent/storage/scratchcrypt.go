// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/storage/dm"
)

// The scratch disk of a confidential guest, from the host's disk up:
//
//	dm-integrity   each block has a tag, HMAC-SHA-256 cut to 16 bytes, of its number and its ciphertext; reading a
//	               block whose tag does not fit is an I/O error
//	dm-crypt       AES-256-XTS
//	ext4
//
// The tags, and all else that dm-integrity stores, are on a disk in the guest's memory (brd), which takes a page when
// something is written to it. So the host holds ciphertext alone: there is no superblock or journal of its to read, and a
// block that it puts back to what it was before does not fit its tag either. A disk of any size is there at once: no tags are
// made for blocks that were never written, and reading one fails. ext4 reads only what it or the formatter has written; its
// reading ahead in inode tables is switched off.
//
// The keys come from the guest's random numbers, are held by the kernel, and go with the guest.
const (
	cryptBlock  = 4096
	tagSize     = 16
	hmacKeySize = 32
	xtsKeySize  = 64 // two of AES-256

	// tagDisk is where the tags are; the image's list of modules gives its size, 16 GiB.
	tagDisk = "/dev/ram0"
	// maxTags is what of it tags may take: less than all, since there is something before them.
	maxTags = 8 << 30
	// tagShare divides the guest's memory: tags take no more than that part of it. What they do not reach of a disk is not used.
	tagShare = 16

	integrityDevice = "scratch-integrity"
	cryptDevice     = "scratch-crypt"
)

// encryptDisk puts encryption with integrity over a disk of so many bytes, with keys of its own, and returns the device to
// use in its place. Nothing on the disk is read, and nothing is written yet.
func encryptDisk(path string, size int64) (device string, err error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return "", fmt.Errorf("sysinfo: %w", err)
	}
	sectors, err := cryptSectors(size, uint64(info.Totalram)*uint64(info.Unit))
	if err != nil {
		return "", err
	}
	var hmacKey [hmacKeySize]byte
	var xtsKey [xtsKeySize]byte
	defer clear(hmacKey[:])
	defer clear(xtsKey[:])
	_, _ = rand.Read(hmacKey[:]) // never fails
	_, _ = rand.Read(xtsKey[:])

	parameters := integrityTable(path, hmacKey[:])
	integrity, err := dm.Create(integrityDevice, dm.Target{Type: "integrity", Sectors: sectors, Parameters: parameters})
	clear(parameters)
	if err != nil {
		return "", err
	}
	parameters = cryptTable(integrity, xtsKey[:])
	device, err = dm.Create(cryptDevice, dm.Target{Type: "crypt", Sectors: sectors, Parameters: parameters})
	clear(parameters)
	if err != nil {
		return "", errors.Join(err, dm.Remove(integrityDevice))
	}
	return device, nil
}

// discardEncrypted takes back encryptDisk.
func discardEncrypted() error {
	return errors.Join(dm.Remove(cryptDevice), dm.Remove(integrityDevice))
}

// cryptSectors is how much of a disk can be used, in units of dm.SectorSize. The disk's size comes from the host.
func cryptSectors(size int64, memory uint64) (uint64, error) {
	if size < cryptBlock {
		return 0, fmt.Errorf("the host's disk has %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	blocks := min(uint64(size)/cryptBlock, min(memory/tagShare, maxTags)/tagSize)
	return blocks * (cryptBlock / dm.SectorSize), nil
}

// integrityTable is the table of dm-integrity (Linux, Documentation/admin-guide/device-mapper/dm-integrity.rst). Mode D
// writes directly: what a crash leaves is of no use, since the keys are lost with it. The smallest buffers, since writes
// that are not whole ones read first. The journal is not used in this mode, but would have a size.
func integrityTable(path string, key []byte) []byte {
	b := fmt.Appendf(nil, "%s 0 %d D 5 meta_device:%s block_size:%d buffer_sectors:8 journal_sectors:64 internal_hash:hmac(sha256):",
		path, tagSize, tagDisk, cryptBlock)
	return hex.AppendEncode(b, key)
}

// cryptTable is the table of dm-crypt (dm-crypt.rst in the same place).
func cryptTable(path string, key []byte) []byte {
	b := hex.AppendEncode([]byte("capi:xts(aes)-plain64 "), key)
	return fmt.Appendf(b, " 0 %s 0 1 sector_size:%d", path, cryptBlock)
}

// diskSize is the size of an open disk, bytes.
func diskSize(disk *os.File) (int64, error) {
	size, err := unix.Seek(int(disk.Fd()), 0, unix.SEEK_END)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", disk.Name(), err)
	}
	return size, nil
}
