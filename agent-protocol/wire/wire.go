// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// Version of the protocol. Peers with the same Major understand each other; Minor counts additions. Since 2.0 every
// connection to the agent begins with the launch's Token.
const (
	Major = 2
	Minor = 2
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
	// readyPorts is the number of ports that ReadyPort has, from 1.
	readyPorts = 1023
	// RPCPort is where the agent listens for further ttrpc connections (events, long calls).
	RPCPort = 1025
	// StreamPort is where the agent listens for stdio streams.
	StreamPort = 1026
)

// ReadyPort is where the host listens for the agent's one connection after boot: 1 to 1023, since a process without
// CAP_NET_BIND_SERVICE can bind no such port of the kernel's vsock and wait there for somebody else's guest. All guests of a
// host share the host's ports, so that the port differs from guest to guest while it boots; both ends know it from the
// guest's CID, without a word on the kernel's (measured) command line. Two CIDs can have the same port: the host takes a CID
// whose port is free.
func ReadyPort(guestCID uint32) uint32 { return 1 + guestCID%readyPorts }

// Limits that both ends enforce. Sizes are bytes.
const (
	// MaxFrame bounds a handshake frame.
	MaxFrame = 64 << 10
	// MaxMessage bounds a ttrpc message (ttrpc's own limit).
	MaxMessage = 4 << 20
	// MaxFileCopy bounds one copied file, MaxFileCopies the sum of a container's.
	MaxFileCopy   = 1 << 20
	MaxFileCopies = 2 << 20
	// MaxCPUs bounds the CPUs of a guest.
	MaxCPUs = 8192
	// MaxTerminationMessage bounds what is told of a container's termination log: as much as the kubelet reads.
	MaxTerminationMessage = 4096
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
	// MaxSharedPath bounds a path in a shared directory, MaxSubmounts the mounts told of one and MaxSubmountPaths the sum of their paths,
	// bytes.
	MaxSharedPath    = 4096
	MaxSubmounts     = 1024
	MaxSubmountPaths = 256 << 10
	// MaxPendingStreams bounds connected streams that no process has claimed yet.
	MaxPendingStreams = 1024
)

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
