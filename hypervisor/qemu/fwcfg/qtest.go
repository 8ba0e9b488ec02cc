// SPDX-License-Identifier: Apache-2.0

package fwcfg

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	keyDirectory  = 0x19
	portDMA       = 0x514
	selectRead    = 0x08 | 0x02
	nameSize      = 56
	entrySize     = 8 + nameSize
	maxFiles      = 4096
	descriptorAt  = 0x100000 // guest memory that may be overwritten: the VM never goes on
	bufferAt      = 0x200000
	descriptorLen = 16
	// maxItem bounds one item; QEMU pads ACPI tables to 128 KiB at least and limits them to 2 MiB.
	maxItem = 4 << 20
	maxLine = 2*maxItem + 64
)

// qtestClient speaks the line protocol of -qtest.
type qtestClient struct {
	conn net.Conn
	in   *bufio.Reader
}

// call sends a command and returns what stands behind "OK" in the answer.
func (q *qtestClient) call(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(q.conn, format+"\n", args...); err != nil {
		return "", err
	}
	var line []byte
	for {
		part, err := q.in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxLine:
			return "", fmt.Errorf("QEMU's answer is too long: %w", errdefs.ErrOutOfRange)
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return "", err
		}
		break
	}
	text, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "OK")
	if !ok {
		return "", fmt.Errorf("QEMU answers %.100q: %w", line, errdefs.ErrFailedPrecondition)
	}
	return strings.TrimSpace(text), nil
}

// read takes an item of the device, by one DMA transfer into the guest's memory, so that the guest cannot come between.
func (q *qtestClient) read(key uint16, size uint32) ([]byte, error) {
	if size == 0 || size > maxItem {
		return nil, fmt.Errorf("%d bytes: %w", size, errdefs.ErrOutOfRange)
	}
	be := binary.BigEndian
	descriptor := be.AppendUint32(nil, uint32(key)<<16|selectRead)
	descriptor = be.AppendUint32(descriptor, size)
	descriptor = be.AppendUint64(descriptor, bufferAt)
	if _, err := q.call("write %#x %d 0x%x", descriptorAt, descriptorLen, descriptor); err != nil {
		return nil, err
	}
	// The device's registers are big-endian. Writing the address's lower half starts the transfer.
	if _, err := q.call("outl %#x 0", portDMA); err != nil {
		return nil, err
	}
	if _, err := q.call("outl %#x %#x", portDMA+4, bits.ReverseBytes32(descriptorAt)); err != nil {
		return nil, err
	}
	state, err := q.memory(descriptorAt, 4)
	if err != nil {
		return nil, err
	}
	if be.Uint32(state) != 0 {
		return nil, fmt.Errorf("the DMA transfer failed (%#x): %w", state, errdefs.ErrUnavailable)
	}
	return q.memory(bufferAt, size)
}

func (q *qtestClient) memory(address uint64, size uint32) ([]byte, error) {
	text, err := q.call("read %#x %d", address, size)
	if err != nil {
		return nil, err
	}
	b, err := hex.DecodeString(strings.TrimPrefix(text, "0x"))
	if err == nil && len(b) != int(size) {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

type file struct {
	key  uint16
	size uint32
}

func (q *qtestClient) directory() (map[string]file, error) {
	head, err := q.read(keyDirectory, 4)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head)
	if n > maxFiles {
		return nil, fmt.Errorf("%d files of the firmware configuration device: %w", n, errdefs.ErrOutOfRange)
	}
	raw, err := q.read(keyDirectory, 4+n*entrySize)
	if err != nil {
		return nil, err
	}
	files := map[string]file{}
	for raw = raw[4:]; len(raw) > 0; raw = raw[entrySize:] {
		name, _, _ := strings.Cut(string(raw[8:entrySize]), "\x00")
		files[name] = file{key: binary.BigEndian.Uint16(raw[4:]), size: binary.BigEndian.Uint32(raw)}
	}
	return files, nil
}
