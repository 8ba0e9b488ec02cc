// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// GUIDs of variables: UEFI Specification, sections 3.3 and 32.6.
var (
	guidGlobalVariable = firmware.MustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	guidImageSecurity  = firmware.MustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
)

// Texts of events: TCG PC Client Platform Firmware Profile, EV_EFI_ACTION.
const (
	actionBoot     = "Calling EFI Application from Boot Option"
	actionExit     = "Exit Boot Services Invocation"
	actionExitDone = "Exit Boot Services Returned with Success"
)

// separator ends the part of a register that belongs to the firmware: EV_SEPARATOR.
func separator() Event { return event("separator", []byte{0, 0, 0, 0}) }

// secureBootVariables are measured as UEFI_VARIABLE_DATA. All are empty: the platform's firmware has no keys, and a guest
// without a variable store has none of its own.
func secureBootVariables() (out []Event) {
	for _, v := range []struct {
		guid firmware.GUID
		name string
	}{
		{guidGlobalVariable, "SecureBoot"}, {guidGlobalVariable, "PK"}, {guidGlobalVariable, "KEK"},
		{guidImageSecurity, "db"}, {guidImageSecurity, "dbx"},
	} {
		b := binary.LittleEndian.AppendUint64(v.guid[:], uint64(len(v.name)))
		b = binary.LittleEndian.AppendUint64(b, 0)
		out = append(out, event("variable "+v.name, b, utf16Bytes(v.name)))
	}
	return out
}

// bootOptions are BootOrder and the only option, the firmware's own setup application: EFI_LOAD_OPTION of UEFI section
// 3.1.3 with a path of two elements, firmware volume and file.
func bootOptions() []Event {
	const (
		active, hidden, application = 0x1, 0x8, 0x100
		typeMedia, volume, file     = 4, 7, 6
		nodeSize                    = 20
	)
	le := binary.LittleEndian
	node := func(kind byte, guid string) []byte {
		g := firmware.MustGUID(guid)
		return append(le.AppendUint16([]byte{typeMedia, kind}, nodeSize), g[:]...)
	}
	path := node(volume, "7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1")
	path = append(path, node(file, "462caa21-7614-4503-836e-8ab6f4662331")...)
	path = append(path, 0x7f, 0xff, 4, 0) // end of the path
	option := le.AppendUint32(nil, active|hidden|application)
	option = le.AppendUint16(option, uint16(len(path)))
	option = append(option, utf16Bytes("UiApp\x00")...)
	return []Event{event("BootOrder", []byte{0, 0}), event("Boot0000", option, path)}
}

// rtmr0 are the events of OVMF up to edk2-stable202502, the only ones known well enough. unsupported says why this
// firmware has others.
func rtmr0(fw *image, p profile, memory uint64, acpi *ACPI) ([]Event, error) {
	unsupported := func(why string) ([]Event, error) {
		return nil, fmt.Errorf("%s: %w", why, errdefs.ErrNotImplemented)
	}
	switch {
	case p.fwcfg:
		return unsupported("this firmware (edk2 later than stable202502) also measures SMBIOS tables, boot settings of the VMM and more boot " +
			"options, which cannot be computed here")
	case p.secureBoot:
		return unsupported("this firmware is built with Secure Boot, and what its variables hold when they are measured is not known")
	case !p.acpi:
		return unsupported("this firmware does not measure ACPI tables; what it measures in place of them is not known")
	case acpi == nil:
		return unsupported("the ACPI tables that QEMU makes for this very VM are measured too and were not given")
	}
	hob, err := handOff(fw.parsed.TDX, memory)
	if err != nil {
		return nil, err
	}
	events := []Event{event("TD hand-off block", hob)}
	for _, s := range fw.parsed.TDX {
		if s.Type != firmware.TDXConfiguration {
			continue
		}
		volume := fw.raw[s.DataOffset:][:s.RawSize]
		if !emptyVariables(volume) {
			return unsupported("this firmware brings variables of its own (keys for Secure Boot), which are measured too")
		}
		events = append(events, event("configuration volume", volume))
	}
	if len(events) != 2 {
		return unsupported(fmt.Sprintf("this firmware has %d configuration volumes, not one", len(events)-1))
	}
	events = append(events, secureBootVariables()...)
	events = append(events, separator())
	events = append(events, acpi.events()...)
	return append(events, bootOptions()...), nil
}

// Where a configuration volume has its first variable: behind the headers of the volume (UEFI Platform Initialization
// Specification, volume 3, 3.2.1) and of edk2's variable store. An erased flash reads as ones.
const (
	volumeHeaderSize = 0x48
	storeHeaderSize  = 28
	noVariable       = 0xffff
)

func emptyVariables(volume []byte) bool {
	const first = volumeHeaderSize + storeHeaderSize
	return len(volume) >= first+2 && binary.LittleEndian.Uint16(volume[first:]) == noVariable
}

// rtmr1 are the events of a kernel that the firmware starts directly.
func rtmr1(p profile, kernel []byte) ([]Event, error) {
	digest, err := Authenticode(kernel)
	if err != nil {
		return nil, err
	}
	if !p.wholeKernel {
		return nil, fmt.Errorf("this firmware (edk2 older than stable202502) takes a kernel whose header QEMU has changed, by addresses that "+
			"are not known here: %w", errdefs.ErrNotImplemented)
	}
	return []Event{
		{"kernel", digest},
		event(actionBoot, []byte(actionBoot)),
		separator(),
		event(actionExit, []byte(actionExit)),
		event(actionExitDone, []byte(actionExitDone)),
	}, nil
}

// rtmr2 are the events of Linux's EFI stub. initrd nil: there is none.
func rtmr2(p profile, parameters string, initrd []byte) ([]Event, error) {
	for _, r := range parameters {
		if r == 0 || r > 0x7e {
			return nil, fmt.Errorf("the kernel's parameters hold the character %#x, which firmware turns into something unknown: %w", r,
				errdefs.ErrInvalidArgument)
		}
	}
	if initrd == nil {
		return []Event{event("parameters", utf16Bytes(parameters+"\x00"))}, nil
	}
	switch p.initrd {
	case initrdBehind:
		parameters += " initrd=initrd"
	case initrdInFront:
		parameters = "initrd=initrd " + parameters
	default:
		return nil, fmt.Errorf("where this firmware puts \"initrd=initrd\" among the kernel's parameters is not known: %w",
			errdefs.ErrNotImplemented)
	}
	return []Event{event("parameters", utf16Bytes(parameters+"\x00")), event("initrd", initrd)}, nil
}
