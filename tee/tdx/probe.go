// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

const (
	vendorIntel = "GenuineIntel"
	vmmType     = "tdx-guest"
	keyResource = "tdx"
	fixKernel   = "run Linux 6.16 or later (or a distribution's kernel with TDX), built with CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL_TDX"
	fixFirmware = "name a firmware image with TDX metadata and without Secure Boot keys in tee.tdx.firmware (Debian 13's OVMF.fd 2025.02, " +
		"or a build of " +
		"edk2's OvmfPkg/IntelTdx; Debian's ovmf-inteltdx starts no unsigned kernel)"
	fixMachine   = "use a machine with an Intel Xeon of the 5th generation or later, or a 4th generation one made for TDX"
	fixParameter = "load kvm_intel with tdx=1, switch TDX, TME-MT and SGX on in the machine's firmware, and read what the kernel says " +
		"(dmesg: virt/tdx)"
)

// Probe looks at the host in the order in which TDX is set up.
func (p *Platform) Probe(_ context.Context, h tee.Host) []tee.Finding {
	return slices.Concat(
		p.probeCPU(),
		p.probeModule(),
		p.probeKVM(h),
		p.probeQuotes(),
		[]tee.Finding{h.ProbeVMM(tee.TDX)},
		p.probeFirmware(),
		p.probeKeys(),
	)
}

func ok(what, format string, args ...any) tee.Finding {
	return tee.Finding{What: what, Result: tee.OK, Detail: fmt.Sprintf(format, args...)}
}

func note(what, format string, args ...any) tee.Finding {
	return tee.Finding{What: what, Result: tee.Note, Detail: fmt.Sprintf(format, args...)}
}

func missing(what, fix, format string, args ...any) tee.Finding {
	return tee.Finding{What: what, Result: tee.Missing, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func (p *Platform) probeCPU() []tee.Finding {
	const what = "Intel CPU"
	switch vendor, err := p.host.CPUVendor(); {
	case err != nil:
		return []tee.Finding{missing(what, "mount /proc", "the CPU's vendor cannot be read: %v", err)}
	case vendor != vendorIntel:
		return []tee.Finding{missing(what, fixMachine, "the CPU's vendor is %q, TDX is of %s", vendor, vendorIntel)}
	}
	return []tee.Finding{ok(what, vendorIntel)}
}

func (p *Platform) probeModule() []tee.Finding {
	const what = "kvm_intel parameter tdx"
	switch value, there, err := p.host.ModuleParameter("kvm_intel", "tdx"); {
	case err != nil:
		return []tee.Finding{missing(what, "give this user access to /sys/module", "it cannot be read: %v", err)}
	case !there && !p.host.ModuleLoaded("kvm_intel"):
		return []tee.Finding{missing(what, "load kvm_intel with tdx=1", "the module kvm_intel is not loaded")}
	case !there:
		return []tee.Finding{missing(what, fixKernel, "the module kvm_intel has no such parameter")}
	case value != "Y" && value != "1":
		return []tee.Finding{missing(what, fixParameter, "it is %q, not \"Y\"", value)}
	}
	return []tee.Finding{ok(what, "Y")}
}

func (p *Platform) probeKVM(h tee.Host) []tee.Finding {
	const what = "KVM's VM types"
	var out []tee.Finding
	if h.Accelerator != "" && h.Accelerator != hypervisor.AccelKVM {
		out = append(out, missing("accelerator", "make KVM usable and set hypervisor.accel to \"kvm\" or \"auto\"",
			"VMs run with %q, TDs need %q", h.Accelerator, hypervisor.AccelKVM))
	}
	types, err := p.host.VMTypes()
	if err != nil {
		return append(out, missing(what, "make /dev/kvm usable", "%v", err))
	}
	offers := hostprobe.DescribeVMTypes(types)
	if types&(1<<hostprobe.VMTypeTDX) == 0 {
		return append(out, missing(what, fixKernel+"; "+fixParameter, "KVM on this host offers VM types %s; TDX needs type %d", offers,
			hostprobe.VMTypeTDX))
	}
	out = append(out, ok(what, "%s", offers))
	for _, c := range []struct {
		name   string
		number int
		need   int // bits
	}{
		{"KVM_CAP_MEMORY_ATTRIBUTES", hostprobe.CapMemoryAttributes, hostprobe.MemoryAttributePrivate},
		{"KVM_CAP_GUEST_MEMFD", hostprobe.CapGuestMemfd, 1},
		{"KVM_CAP_X86_APIC_BUS_CYCLES_NS", hostprobe.CapX86APICBusCyclesNS, 1},
	} {
		switch value, err := p.host.KVMExtension(c.number); {
		case err != nil:
			out = append(out, missing(c.name, "make /dev/kvm usable", "%v", err))
		case value&c.need == 0:
			out = append(out, missing(c.name, fixKernel, "KVM answers %d for capability %d", value, c.number))
		default:
			out = append(out, ok(c.name, "%d", value))
		}
	}
	return out
}

func (p *Platform) probeQuotes() []tee.Finding {
	const what = "Quote Generation Service"
	const without = "guests start but cannot be attested"
	switch q := p.quoteSocket; {
	case q == nil:
		return []tee.Finding{note(what, "none is configured (tee.tdx.quote_socket): %s", without)}
	case q.Path == "":
		return []tee.Finding{note(what, "vsock CID %d port %d, not tried", q.CID, q.Port)}
	default:
		if err := p.host.CanConnect(q.Path); err != nil {
			return []tee.Finding{note(what, "%v: %s; install and start Intel's qgsd, or correct tee.tdx.quote_socket", err, without)}
		}
		return []tee.Finding{ok(what, "%s", q.Path)}
	}
}

func (p *Platform) probeFirmware() []tee.Finding {
	const what = "firmware with TDX metadata"
	fw, err := p.firmware()
	if err != nil {
		detail, fix := firmware.Describe(err)
		return []tee.Finding{missing(what, fix, "%s", detail)}
	}
	var kinds []string
	for _, s := range fw.parsed.TDX {
		kinds = append(kinds, s.Type.String())
	}
	out := []tee.Finding{ok(what, "%s, SHA-256 %s, sections %s", fw.path, fw.digest, strings.Join(kinds, " "))}
	for _, s := range fw.parsed.TDX {
		if s.Type == firmware.TDXConfiguration && !emptyVariables(fw.raw[s.DataOffset:][:s.RawSize]) {
			out = append(out, note("Secure Boot", "this firmware brings variables of its own: with keys enrolled it starts kernels that are "+
				"signed for them only"))
		}
	}
	return out
}

func (p *Platform) probeKeys() []tee.Finding {
	const what = "free TDX key ids"
	switch capacity, current, there, err := p.host.Misc(keyResource); {
	case err != nil:
		return []tee.Finding{note(what, "the misc cgroup cannot be read: %v", err)}
	case !there:
		return []tee.Finding{note(what, "this kernel does not count them (misc cgroup controller, resource %q)", keyResource)}
	case current >= capacity:
		return []tee.Finding{missing(what, "stop TDs, or raise the number of TDX keys in the machine's firmware", "all %d are in use", capacity)}
	default:
		return []tee.Finding{ok(what, "%d of %d", capacity-current, capacity)}
	}
}
