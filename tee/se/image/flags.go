// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/json"
	"fmt"
	"math/bits"
)

// PCF are plaintext control flags, which the host sees; bits count from the most significant one.
type PCF uint64

// Plaintext control flags.
const (
	// AllowDump lets the host take a dump of the guest's memory, encrypted for the holder of the CCK.
	AllowDump PCF = 1 << (63 - 34)
	// NoComponentEncryption leaves kernel, initrd and command line readable by the host.
	NoComponentEncryption PCF = 1 << (63 - 35)
	// The PCKMO functions that make protected keys of the CPU's crypto functions.
	PCKMODEA  PCF = 1 << (63 - 56)
	PCKMOAES  PCF = 1 << (63 - 57)
	PCKMOECC  PCF = 1 << (63 - 58)
	PCKMOHMAC PCF = 1 << (63 - 59)
	// BackupTargetKeys lets a machine open the image with its backup host key as well.
	BackupTargetKeys PCF = 1 << (63 - 62)

	// DefaultPCF is what images get: the PCKMO functions for DEA, AES and ECC.
	DefaultPCF = PCKMODEA | PCKMOAES | PCKMOECC
)

// SCF are secret control flags, which only the ultravisor sees.
type SCF uint64

// Secret control flags.
const (
	// CCKExtensionSecret demands that secrets added to the running guest carry an extension derived from the CCK.
	CCKExtensionSecret SCF = 1 << (63 - 1)
	// CCKUpdate lets the running guest replace its CCK.
	CCKUpdate SCF = 1 << (63 - 2)
)

var pcfNames = map[uint64]string{
	uint64(AllowDump): "allow-dump", uint64(NoComponentEncryption): "no-component-encryption",
	uint64(PCKMODEA): "pckmo-dea", uint64(PCKMOAES): "pckmo-aes", uint64(PCKMOECC): "pckmo-ecc", uint64(PCKMOHMAC): "pckmo-hmac",
	uint64(BackupTargetKeys): "backup-target-keys",
}

var scfNames = map[uint64]string{
	uint64(CCKExtensionSecret): "cck-extension-secret", uint64(CCKUpdate): "cck-update",
}

// Names of the flags that are set, unknown ones by their number.
func (f PCF) Names() []string { return flagNames(uint64(f), pcfNames) }

// MarshalJSON returns {"value": "0x…", "flags": [names]}.
func (f PCF) MarshalJSON() ([]byte, error) { return flagsJSON(uint64(f), pcfNames) }

// Names of the flags that are set, unknown ones by their number.
func (f SCF) Names() []string { return flagNames(uint64(f), scfNames) }

// MarshalJSON returns {"value": "0x…", "flags": [names]}.
func (f SCF) MarshalJSON() ([]byte, error) { return flagsJSON(uint64(f), scfNames) }

func flagNames(value uint64, names map[uint64]string) []string {
	out := []string{}
	for value != 0 {
		n := bits.LeadingZeros64(value)
		bit := uint64(1) << (63 - n)
		name, ok := names[bit]
		if !ok {
			name = fmt.Sprintf("unknown-%d", n)
		}
		out = append(out, name)
		value &^= bit
	}
	return out
}

func flagsJSON(value uint64, names map[uint64]string) ([]byte, error) {
	return json.Marshal(struct {
		Value string   `json:"value"`
		Flags []string `json:"flags"`
	}{fmt.Sprintf("0x%016x", value), flagNames(value, names)})
}
