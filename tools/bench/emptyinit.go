// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/u-root/u-root/pkg/cpio"
)

// initMark is what the empty init says; the kernel, told to be quiet, says nothing before it.
const initMark = "empty init\n"

// emptyInit is a static ELF program for x86-64 that writes initMark to its stdout and restarts the machine:
//
//	write(1, initMark, len(initMark)); reboot(0xfee1dead, 0x28121969, LINUX_REBOOT_CMD_RESTART); for (;;);
//
// It is made of bytes, so that the baseline needs no compiler and pays for no runtime.
func emptyInit() []byte {
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, SYS_write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 0, 0, 0, 0, // lea rsi, [rip+offset of initMark]
		0xba, byte(len(initMark)), 0, 0, 0, // mov edx, length
		0x0f, 0x05, // syscall
		0xb8, 169, 0, 0, 0, // mov eax, SYS_reboot
		0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
		0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
		0xba, 0x67, 0x45, 0x23, 0x01, // mov edx, LINUX_REBOOT_CMD_RESTART
		0x0f, 0x05, // syscall
		0xeb, 0xfe, // jmp $
	}
	const afterLea = 17
	binary.LittleEndian.PutUint32(code[13:], uint32(len(code)-afterLea))
	code = append(code, initMark...)

	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code))
	var b bytes.Buffer
	put := func(values ...any) {
		for _, v := range values {
			_ = binary.Write(&b, binary.LittleEndian, v) // into memory: no error
		}
	}
	b.WriteString("\x7fELF\x02\x01\x01" + string(make([]byte, 9)))
	put(uint16(2), uint16(62), uint32(1))                       // ET_EXEC, EM_X86_64, version
	put(uint64(base+headers), uint64(64), uint64(0), uint32(0)) // entry, program headers, no sections, flags
	put(uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0))
	put(uint32(1), uint32(5), uint64(0), uint64(base), uint64(base)) // PT_LOAD, r-x
	put(size, size, uint64(4096))
	b.Write(code)
	return b.Bytes()
}

// emptyInitrd holds the empty init and the console that the kernel opens for it.
func emptyInitrd() ([]byte, error) {
	return writeInitrd([]cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(emptyInit()), 0o755),
	})
}

func writeInitrd(records []cpio.Record) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	if err := cpio.WriteRecords(w, records); err != nil {
		return nil, fmt.Errorf("make an initrd: %w", err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("make an initrd: %w", err)
	}
	return b.Bytes(), nil
}

// probeInitrd is the guest image's initrd with another init.
func probeInitrd(image io.ReaderAt, init []byte) ([]byte, error) {
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(image))
	if err != nil {
		return nil, fmt.Errorf("read the guest's initrd: %w", err)
	}
	found := false
	for i := range records {
		if records[i].Name == "init" {
			records[i], found = cpio.StaticFile("init", string(init), 0o755), true
		}
	}
	if !found {
		return nil, fmt.Errorf("the guest's initrd has no init")
	}
	return writeInitrd(records)
}
