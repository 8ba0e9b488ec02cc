// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"crypto/sha512"
	"encoding/hex"

	"github.com/cloister-project/cloister/tee/abi"
)

// DigestSize of all measurements of a TD: SHA-384, in bytes.
const DigestSize = abi.TDXDigestSize

// Digest is a SHA-384 digest or a register's value.
type Digest [DigestSize]byte

// String returns lower-case hexadecimal digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Event is one measurement that goes into a register.
type Event struct {
	// What is measured, for people.
	What   string
	Digest Digest
}

func event(what string, data ...[]byte) Event { return Event{what, sum(data...)} }

func sum(data ...[]byte) (d Digest) {
	h := sha512.New384()
	for _, b := range data {
		h.Write(b)
	}
	h.Sum(d[:0])
	return d
}

// Extend replays events into a register that starts as zero: TDG.MR.RTMR.EXTEND, SHA384(old ‖ digest) for each.
func Extend(events ...Event) (register Digest) {
	for _, e := range events {
		register = sum(register[:], e.Digest[:])
	}
	return register
}
