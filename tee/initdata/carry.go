// SPDX-License-Identifier: Apache-2.0

package initdata

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"io"
	"strings"
)

// MaxAnnotation bounds the annotation's value, bytes: what Kubernetes allows for all annotations of a pod.
const MaxAnnotation = 256 << 10

// maxPacked bounds the gzip on a disk. Text that does not compress grows by a few bytes for each 64 KiB.
const maxPacked = MaxRaw + MaxRaw/64 + 1024

// The disk's format: magic, length of the gzip (little-endian), gzip, zero bytes up to a multiple of a sector.
const (
	diskMagic  = "initdata"
	headerSize = len(diskMagic) + 8
	sectorSize = 512
)

// DecodeAnnotation returns the TOML text of an annotation's value. It is not parsed yet.
func DecodeAnnotation(value string) ([]byte, error) {
	if len(value) > MaxAnnotation {
		return nil, invalid("annotation has %d bytes; the limit is %d", len(value), MaxAnnotation)
	}
	packed, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value))
	if err != nil {
		return nil, invalid("annotation is not base64 (%v); make it with: gzip -c initdata.toml | base64 -w0", err)
	}
	return unpack(packed)
}

// EncodeAnnotation is the reverse of DecodeAnnotation.
func EncodeAnnotation(raw []byte) (string, error) {
	packed, err := pack(raw)
	return base64.StdEncoding.EncodeToString(packed), err
}

// WriteDisk writes the image of a disk that carries raw.
func WriteDisk(w io.Writer, raw []byte) error {
	packed, err := pack(raw)
	if err != nil {
		return err
	}
	image := binary.LittleEndian.AppendUint64([]byte(diskMagic), uint64(len(packed)))
	image = append(image, packed...)
	if rest := len(image) % sectorSize; rest != 0 {
		image = append(image, make([]byte, sectorSize-rest)...)
	}
	_, err = w.Write(image)
	return err
}

// ReadDisk reads what WriteDisk wrote. The reader may go on behind it; what follows is not looked at.
func ReadDisk(r io.Reader) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, invalid("disk cannot be read or is too short: %v", err)
	}
	if string(header[:len(diskMagic)]) != diskMagic {
		return nil, invalid("disk does not begin with %q", diskMagic)
	}
	size := binary.LittleEndian.Uint64(header[len(diskMagic):])
	if size > maxPacked {
		return nil, invalid("disk says that it holds %d bytes; the limit is %d", size, maxPacked)
	}
	packed := make([]byte, size)
	if _, err := io.ReadFull(r, packed); err != nil {
		return nil, invalid("disk is shorter than it says: %v", err)
	}
	return unpack(packed)
}

// pack is deterministic: no name, no time.
func pack(raw []byte) ([]byte, error) {
	if len(raw) > MaxRaw {
		return nil, invalid("has %d bytes; the limit is %d", len(raw), MaxRaw)
	}
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// unpack inflates one gzip member, up to MaxRaw bytes.
func unpack(packed []byte) ([]byte, error) {
	src := bytes.NewReader(packed)
	r, err := gzip.NewReader(src)
	if err != nil {
		return nil, invalid("is not gzip: %v", err)
	}
	r.Multistream(false)
	raw, err := io.ReadAll(io.LimitReader(r, MaxRaw+1))
	if err != nil {
		return nil, invalid("cannot be unpacked: %v", err)
	}
	if len(raw) > MaxRaw {
		return nil, invalid("is larger than %d bytes when it is unpacked", MaxRaw)
	}
	if src.Len() != 0 {
		return nil, invalid("has %d bytes behind its one gzip member", src.Len())
	}
	return raw, nil
}
