// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"

	"github.com/containerd/errdefs"
	"github.com/ulikunitz/xz/lzma"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Builds of edk2 differ in what they measure and in the text they add to the kernel's parameters. Both show in the image:
// its drivers lie in a section that is compressed with LZMA, and carry the names and texts below.

// initrdPlace is where the firmware puts its "initrd=initrd" among the kernel's parameters.
type initrdPlace int

const (
	initrdUnknown initrdPlace = iota
	initrdBehind              // edk2-stable202502 and older
	initrdInFront             // newer
)

// profile of a firmware build.
type profile struct {
	// measures: it has the driver that extends a TD's RTMRs.
	measures bool
	// acpi: it measures the ACPI blobs that it takes from the VMM.
	acpi bool
	// fwcfg: it measures further blobs of the VMM at an early stage, SMBIOS tables and more boot options. What exactly
	// depends on the build.
	fwcfg bool
	// wholeKernel: it takes the kernel as it is on disk (fw_cfg etc/boot/kernel, QEMU 10.0 and later). Else it takes it in
	// parts, after QEMU wrote addresses and sizes into the header.
	wholeKernel bool
	// secureBoot: it is built with Secure Boot, so that the variable SecureBoot is there.
	secureBoot bool
	initrd     initrdPlace
}

const (
	// maxInflated bounds a decompressed section; OVMF builds have up to 16 MiB.
	maxInflated = 64 << 20
	// maxCompressed sections of compressed content in one image, tried until one can be decompressed.
	maxCompressed = 8
	// maxLZMADictionary bounds the memory of the decompressor; OVMF has 16 MiB.
	lzmaHeaderSize    = 13
	maxLZMADictionary = 32 << 20
	// A GUIDed section: UEFI Platform Initialization Specification, volume 3, 3.2.5.1.
	sectionHeaderSize = 4
	guidedDataOffset  = 16
)

// lzmaSection marks a section that is compressed with LZMA, as edk2's tools make it.
var lzmaSection = firmware.MustGUID("ee4e5898-3914-4259-9d6e-dc7bd79403cf")

// Traces in the image.
var (
	traceDriver  = utf16Bytes("TdTcg2Dxe")
	traceACPI    = []byte("ACPI DATA\x00")
	traceFwCfg   = []byte("QEMU FW CFG\x00")
	traceKernel  = []byte("etc/boot/\x00")
	traceSecure  = utf16Bytes("SecureBootEnable")
	traceBehind  = []byte(" initrd=initrd\x00")
	traceInFront = []byte("initrd=initrd \x00")
)

// readProfile looks into an image. errdefs.ErrNotFound: it is not built like OVMF, nothing can be told.
func readProfile(image []byte) (profile, error) {
	drivers, err := inflateDrivers(image)
	if err != nil {
		return profile{}, err
	}
	p := profile{
		measures:    bytes.Contains(drivers, traceDriver),
		acpi:        bytes.Contains(drivers, traceACPI),
		secureBoot:  bytes.Contains(drivers, traceSecure),
		wholeKernel: bytes.Contains(drivers, traceKernel),
		fwcfg:       bytes.Contains(image, traceFwCfg) || bytes.Contains(drivers, traceFwCfg),
	}
	switch behind, inFront := bytes.Contains(drivers, traceBehind), bytes.Contains(drivers, traceInFront); {
	case behind && !inFront:
		p.initrd = initrdBehind
	case inFront && !behind:
		p.initrd = initrdInFront
	}
	return p, nil
}

// inflateDrivers decompresses the first section that can be.
func inflateDrivers(image []byte) ([]byte, error) {
	rest, reasons := image, []error(nil)
	for range maxCompressed {
		at := bytes.Index(rest, lzmaSection[:])
		if at < 0 {
			break
		}
		section := rest[at:]
		rest = rest[at+len(lzmaSection):]
		if len(section) < guidedDataOffset+2 {
			break
		}
		// Counted from the section's header, which is in front of the GUID.
		skip := int(binary.LittleEndian.Uint16(section[guidedDataOffset:])) - sectionHeaderSize
		if skip < guidedDataOffset+2 || skip > len(section) {
			continue
		}
		out, err := inflate(section[skip:])
		if err == nil {
			return out, nil
		}
		reasons = append(reasons, err)
	}
	return nil, fmt.Errorf("the firmware has no compressed section as OVMF has it: %w (%w)", errors.Join(reasons...), errdefs.ErrNotFound)
}

// inflate decompresses LZMA's old container with a known size.
func inflate(data []byte) ([]byte, error) {
	if len(data) < lzmaHeaderSize {
		return nil, fmt.Errorf("%d bytes: %w", len(data), errdefs.ErrInvalidArgument)
	}
	dictionary, size := binary.LittleEndian.Uint32(data[1:]), binary.LittleEndian.Uint64(data[5:])
	if dictionary > maxLZMADictionary || size > maxInflated || size == 0 {
		return nil, fmt.Errorf("compressed with a dictionary of %d and a size of %d bytes: %w", dictionary, size, errdefs.ErrInvalidArgument)
	}
	r, err := lzma.ReaderConfig{DictCap: maxLZMADictionary}.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err == nil && uint64(len(out)) != size {
		err = io.ErrUnexpectedEOF
	}
	return out, err
}

// utf16Bytes is text in UTF-16LE, without a final NUL.
func utf16Bytes(text string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(text)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
