// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

const fixFirmwareSettings = "take a host with an AMD EPYC 7003 or later, and switch on SMEE, SEV-ES, the RMP table and SEV-SNP in the " +
	"machine's firmware settings"

// Probe goes from the CPU to what is configured, in the order in which a node is set up.
func (p *Platform) Probe(_ context.Context, h tee.Host) []tee.Finding {
	findings := []tee.Finding{p.probeCPU()}
	for _, name := range []string{"sev", "sev_es", "sev_snp"} {
		findings = append(findings, p.probeParameter(name))
	}
	findings = append(findings, p.probeDevice(), p.probeKVM(h.Accelerator), h.ProbeVMM(tee.SNP), p.probeFirmware())
	if p.config.IDKey != "" {
		findings = append(findings, p.probeKeys())
	}
	return append(findings, p.probeASIDs())
}

func finding(what, detail, fix string) tee.Finding {
	f := tee.Finding{What: what, Result: tee.OK, Detail: detail, Fix: fix}
	if fix != "" {
		f.Result = tee.Missing
	}
	return f
}

func (p *Platform) probeCPU() tee.Finding {
	const what = "CPU with SEV-SNP"
	sev, ok := p.sev()
	switch vendor, err := p.host.CPUVendor(); {
	case !ok && err == nil && vendor != "" && vendor != "AuthenticAMD":
		return finding(what, "the CPU is "+vendor+"'s, not AMD's", fixFirmwareSettings)
	case !ok:
		return finding(what, "CPUID 0x8000001F shows no memory encryption", fixFirmwareSettings)
	case !sev.SNP:
		return finding(what, fmt.Sprintf("CPUID 0x8000001F shows SEV %t, SEV-ES %t, SEV-SNP false", sev.SEV, sev.ES), fixFirmwareSettings)
	}
	return finding(what, fmt.Sprintf("C-bit %d, %d bits of physical address reserved, %d ASIDs", sev.CBitPosition, sev.ReducedPhysBits,
		sev.ASIDs), "")
}

func (p *Platform) probeParameter(name string) tee.Finding {
	const fix = "run a kernel 6.11 or newer as host with kvm_amd's parameters sev=1 sev_es=1 sev_snp=1, and without iommu=pt; if the value " +
		"stays N, the kernel's log says why (dmesg | grep -e SEV -e RMP)"
	what := "kvm_amd's parameter " + name
	value, ok, err := p.host.ModuleParameter("kvm_amd", name)
	switch {
	case err != nil:
		return finding(what, err.Error(), fix)
	case !ok:
		return finding(what, "the module kvm_amd is not loaded, or is too old to have it", fix)
	case value != "Y" && value != "1":
		return finding(what, fmt.Sprintf("it is %q", value), fix)
	}
	return finding(what, "it is "+value, "")
}

func (p *Platform) probeDevice() tee.Finding {
	const what = "/dev/sev"
	if err := p.host.CanOpen(what); err != nil {
		return finding(what, err.Error(), "load the module ccp; the device belongs to root, and QEMU opens it as the user that it runs as")
	}
	return finding(what, "opens", "")
}

func (p *Platform) probeKVM(accelerator hypervisor.Accelerator) tee.Finding {
	const what, fix = "KVM's VM type SEV-SNP", "set up the CPU and kvm_amd as above; hypervisor.accel must be auto or kvm"
	if accelerator != "" && accelerator != hypervisor.AccelKVM {
		return finding(what, fmt.Sprintf("the accelerator is %s", accelerator), fix)
	}
	types, err := p.host.VMTypes()
	switch {
	case err != nil:
		return finding(what, err.Error(), fix)
	case types&(1<<hostprobe.VMTypeSNP) == 0:
		return finding(what, fmt.Sprintf("KVM on this host offers VM types %s; SEV-SNP needs type %d", hostprobe.DescribeVMTypes(types),
			hostprobe.VMTypeSNP), fix)
	}
	return finding(what, "KVM offers VM types "+hostprobe.DescribeVMTypes(types), "")
}

func (p *Platform) probeFirmware() tee.Finding {
	const what = "firmware"
	if p.config.IGVM {
		return p.probeIGVM()
	}
	path, digest, err := p.acceptedFirmware()
	if err != nil {
		detail, fix := firmware.Describe(err)
		return finding(what, detail, fix)
	}
	return finding(what, fmt.Sprintf("%s, SHA-256 %s", path, digest), "")
}

// probeIGVM looks for the IGVM files of all numbers of virtual CPUs. What is there must be accepted; a pod needs one of them.
func (p *Platform) probeIGVM() tee.Finding {
	const what = "IGVM files"
	var counts []string
	for cpus := 1; cpus <= MaxCPUs; cpus++ {
		switch _, _, _, err := p.acceptedIGVM(cpus); {
		case err == nil:
			counts = append(counts, strconv.Itoa(cpus))
		case !errors.Is(err, os.ErrNotExist):
			detail, fix := firmware.Describe(err)
			return finding(what, detail, fix)
		}
	}
	if len(counts) == 0 {
		_, _, _, err := p.acceptedIGVM(1)
		detail, fix := firmware.Describe(err)
		return finding(what, detail, fix)
	}
	return finding(what, fmt.Sprintf("%s, for %s virtual CPUs", p.config.Firmware, strings.Join(counts, ", ")), "")
}

func (p *Platform) probeKeys() tee.Finding {
	const what = "keys of the ID block"
	id, author, err := p.keys()
	if err != nil {
		return finding(what, err.Error(), "give ECDSA P-384 keys in PEM (openssl ecparam -name secp384r1 -genkey -noout), readable by root only")
	}
	digest, err := KeyDigest(&id.PublicKey)
	if err != nil {
		return finding(what, err.Error(), "take another key")
	}
	detail := fmt.Sprintf("%s, key digest %x", p.config.IDKey, digest)
	if author != nil {
		detail += "; author key " + p.config.AuthorKey
	}
	return finding(what, detail, "")
}

// probeASIDs: SEV-SNP guests share the ASIDs of SEV-ES.
func (p *Platform) probeASIDs() tee.Finding {
	const what = "free ASIDs"
	capacity, current, ok, err := p.host.Misc("sev_es")
	switch {
	case err != nil:
		return tee.Finding{What: what, Result: tee.Note, Detail: err.Error()}
	case !ok:
		return tee.Finding{What: what, Result: tee.Note, Detail: "this kernel does not count them (misc cgroup controller, resource sev_es)"}
	case current >= capacity:
		return finding(what, fmt.Sprintf("%d of %d are in use", current, capacity),
			"stop other SEV-ES and SEV-SNP VMs, or leave more ASIDs to them in the machine's firmware settings (SEV-ES ASID space limit)")
	}
	return finding(what, fmt.Sprintf("%d of %d", capacity-current, capacity), "")
}
