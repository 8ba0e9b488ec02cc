// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Fields of struct bpf_sk_lookup (linux/bpf.h).
const (
	offFamily   = 8
	offProtocol = 12
	offLocalIP4 = 40
	offLocalIP6 = 44
)

// Keys of the map of listeners.
const (
	keyIPv4 = 0
	keyIPv6 = 1
)

// steer makes the namespace's kernel hand all connections to loopback addresses to the listeners, by key. Closing what it
// returns takes that back.
func steer(ns *os.File, listeners [2]*net.TCPListener) (_ io.Closer, err error) {
	all := &attachment{}
	defer func() {
		if err != nil {
			_ = all.Close()
		}
	}()
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 2})
	if err != nil {
		return nil, fmt.Errorf("make a map of sockets: %w", err)
	}
	// The program keeps the map.
	defer sockets.Close()
	for key, l := range listeners {
		raw, err := l.SyscallConn()
		if err != nil {
			return nil, err
		}
		var put error
		err = raw.Control(func(fd uintptr) { put = sockets.Put(uint32(key), uint64(fd)) })
		if err := errors.Join(err, put); err != nil {
			return nil, fmt.Errorf("put a listener into the map of sockets: %w", err)
		}
	}
	all.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "cloister_forward", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Apache-2.0", Instructions: lookup(sockets),
	})
	if err != nil {
		return nil, fmt.Errorf("load a program of type sk_lookup: %w", err)
	}
	if all.link, err = link.AttachNetNs(int(ns.Fd()), all.program); err != nil {
		return nil, fmt.Errorf("attach a program to the network namespace: %w", err)
	}
	return all, nil
}

// attachment is the program and its link to the namespace.
type attachment struct {
	program *ebpf.Program
	link    *link.NetNsLink
}

func (a *attachment) Close() error {
	var err error
	if a.link != nil {
		err = a.link.Close()
	}
	if a.program != nil {
		err = errors.Join(err, a.program.Close())
	}
	return err
}

// word is four bytes in network order as the program loads them.
func word(b ...byte) int32 { return int32(binary.NativeEndian.Uint32(b)) }

// lookup is the program: SK_PASS for everything, with a listener for TCP to 127.0.0.0/8 and ::1.
func lookup(sockets *ebpf.Map) asm.Instructions {
	const pass, ipv4, assign = "pass", "ipv4", "assign"
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, offProtocol, asm.Word),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, pass),
		asm.LoadMem(asm.R1, asm.R6, offFamily, asm.Word),
		asm.JEq.Imm(asm.R1, unix.AF_INET, ipv4),
		asm.JNE.Imm(asm.R1, unix.AF_INET6, pass),
	}
	for i, want := range []int32{0, 0, 0, word(0, 0, 0, 1)} {
		code = append(code,
			asm.LoadMem(asm.R1, asm.R6, int16(offLocalIP6+4*i), asm.Word),
			asm.JNE.Imm(asm.R1, want, pass),
		)
	}
	return append(code,
		asm.StoreImm(asm.R10, -4, keyIPv6, asm.Word),
		asm.Ja.Label(assign),

		asm.LoadMem(asm.R1, asm.R6, offLocalIP4, asm.Word).WithSymbol(ipv4),
		asm.And.Imm(asm.R1, word(0xff, 0, 0, 0)),
		asm.JNE.Imm(asm.R1, word(127, 0, 0, 0), pass),
		asm.StoreImm(asm.R10, -4, keyIPv4, asm.Word),

		asm.LoadMapPtr(asm.R1, sockets.FD()).WithSymbol(assign),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, pass),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.FnSkRelease.Call(),

		asm.Mov.Imm(asm.R0, 1).WithSymbol(pass), // SK_PASS
		asm.Return(),
	)
}
