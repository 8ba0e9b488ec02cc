// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// Version of the protocol. Peers with the same Major understand each other; Minor counts additions.
const (
	Major = 1
	Minor = 1
)

// What a confidential guest is told by its launch. ParamTEE is on the kernel's command line, which is measured: it names
// the platform (package tee), and the agent stops if the hardware is another. ParamInitdata gives initdata's binding in
// hex where no register of the hardware holds it: in a Secure Execution image, sealed, and on the sample platform. The
// disk with InitdataSerial carries the document itself.
const (
	ParamTEE       = ParamPrefix + "tee"
	ParamInitdata  = ParamPrefix + "initdata"
	InitdataSerial = "initdata"
)

// ParamPrefix begins the names of all kernel parameters that speak to the agent. ParamDebug makes the agent tell more on
// the console, which the host reads (log.debug_console): the agent of a confidential guest refuses it.
const (
	ParamPrefix = "cloister."
	ParamDebug  = ParamPrefix + "debug"
)

// Vsock ports.
const (
	// readyBase is the port below those of ReadyPort.
	readyBase = 1024
	// RPCPort is where the agent listens for further ttrpc connections (events, long calls).
	RPCPort = 1025
	// StreamPort is where the agent listens for stdio streams.
	StreamPort = 1026
)

// ReadyPort is where the host listens for the agent's one connection after boot. With the kernel's vsock all guests of a
// host share the host's ports, so that each has its own; both ends know it from the guest's CID, below 2^31, without a
// word on the kernel's (measured) command line.
func ReadyPort(guestCID uint32) uint32 { return readyBase + guestCID }

// Limits that both ends enforce. Sizes are bytes.
const (
	// MaxFrame bounds a handshake frame.
	MaxFrame = 64 << 10
	// MaxMessage bounds a ttrpc message (ttrpc's own limit).
	MaxMessage = 4 << 20
	// MaxFileCopy bounds one copied file, MaxFileCopies the sum of a container's.
	MaxFileCopy   = 1 << 20
	MaxFileCopies = 2 << 20
	// A pod's volumes that are copied: their number, and of each the files, their names' length and the sum of their sizes.
	// A Secret or ConfigMap has at most 1 MiB; a projected volume gathers several.
	MaxVolumes     = 128
	MaxVolumeFiles = 1024
	MaxVolumePath  = 512
	MaxVolumeBytes = 8 << 20
	// MaxVolumeChunk bounds the contents in one PutVolume.
	MaxVolumeChunk = 1 << 20
	// MaxSpec bounds an OCI configuration in JSON.
	MaxSpec = 2 << 20
	// MaxContainers bounds the containers of a pod at one time, MaxProcesses the further processes of a container.
	MaxContainers = 512
	MaxProcesses  = 4096
	// MaxLayers bounds the layers of a root filesystem (overlayfs takes 500).
	MaxLayers = 500
	// MaxMounts bounds the mounts of a container.
	MaxMounts = 1024
	// MaxPendingStreams bounds connected streams that no process has claimed yet.
	MaxPendingStreams = 1024
)

// StreamIDLen is the length of a stream's id in bytes.
const StreamIDLen = 16

// Answers of the agent to a stream's header.
const (
	StreamAccepted = 0
	StreamRefused  = 1
)

// StreamID names a stdio stream: random, chosen by the host, used once.
type StreamID [StreamIDLen]byte

// NewStreamID makes a random id.
func NewStreamID() StreamID {
	var id StreamID
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	return id
}

// String returns the id as 32 lower-case hex digits, as it stands in agentv1.Stdio.
func (id StreamID) String() string { return hex.EncodeToString(id[:]) }

// ParseStreamID is the reverse of String.
func ParseStreamID(s string) (StreamID, error) {
	var id StreamID
	if len(s) != 2*StreamIDLen {
		return id, fmt.Errorf("stream id has %d characters, want %d", len(s), 2*StreamIDLen)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return id, fmt.Errorf("stream id: %w", err)
	}
	if id.String() != s {
		return id, errors.New("stream id is not lower-case hex")
	}
	return id, nil
}

// WriteStreamHeader names the stream on a fresh connection to StreamPort and waits for the agent's answer.
func WriteStreamHeader(rw io.ReadWriter, id StreamID) error {
	if _, err := rw.Write(id[:]); err != nil {
		return fmt.Errorf("send stream header: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(rw, answer[:]); err != nil {
		return fmt.Errorf("read the answer to a stream header: %w", err)
	}
	if answer[0] != StreamAccepted {
		return errors.New("the agent refused the stream: too many unclaimed streams, or its id was used before")
	}
	return nil
}

// ReadStreamHeader is the agent's half of WriteStreamHeader; the caller answers with StreamAccepted or StreamRefused.
func ReadStreamHeader(r io.Reader) (StreamID, error) {
	var id StreamID
	_, err := io.ReadFull(r, id[:])
	return id, err
}

// WriteFrame sends a message as a 4-byte big-endian length and its protobuf encoding.
func WriteFrame(w io.Writer, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > MaxFrame {
		return fmt.Errorf("frame of %d bytes is over the limit of %d", len(body), MaxFrame)
	}
	buf := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	_, err = w.Write(append(buf, body...))
	return err
}

// ReadFrame reads what WriteFrame wrote. It reads not one byte more, so that r can carry on as something else.
func ReadFrame(r io.Reader, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxFrame {
		return fmt.Errorf("frame of %d bytes is over the limit of %d", n, MaxFrame)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	return proto.Unmarshal(body, m)
}

// ValidID reports whether s can be a container's or exec's id: 1 to 128 of [A-Za-z0-9_.-], the first one alphanumeric.
// Such an id is a safe path element. It is no regular expression: compiling one would cost each start of the agent's
// binary, and each process of a container starts as a copy of it.
func ValidID(s string) bool {
	if len(s) == 0 || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return true
}
