// SPDX-License-Identifier: Apache-2.0

package se

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

// Facilities of the machine: z/Architecture Principles of Operation, "Facility Indications".
const (
	facilityUltravisor = 158 // Ultravisor-call facility: the machine can host protected guests
	facilityUnpack     = 161 // Unpack facility: guests can become protected ones
)

const (
	uvHost       = "/sys/firmware/uv/prot_virt_host"
	uvGuest      = "/sys/firmware/uv/prot_virt_guest"
	uvKeys       = "/sys/firmware/uv/keys/all"
	kernelParam  = "prot_virt=1"
	machineS390X = "IBM/S390"
	// maxHostKeys is how many hashes the list of the firmware has room for.
	maxHostKeys = 15
	hashDigits  = 64
)

// Probe looks in the order in which a host is set up: machine, kernel, KVM, host key, VMM.
func (p *Platform) Probe(_ context.Context, h tee.Host) []tee.Finding {
	machine := p.machine()
	if machine.Result == tee.Missing {
		// On another machine nothing below exists, and naming each would only hide the reason.
		return []tee.Finding{machine, p.image()}
	}
	return []tee.Finding{machine, p.facilities(), p.ultravisor(), p.kvm(h.Accelerator), p.image(), p.hostKey(), h.ProbeVMM(tee.SE)}
}

func found(what, format string, a ...any) tee.Finding {
	return tee.Finding{What: what, Result: tee.OK, Detail: fmt.Sprintf(format, a...)}
}

func missing(what, fix, format string, a ...any) tee.Finding {
	return tee.Finding{What: what, Result: tee.Missing, Detail: fmt.Sprintf(format, a...), Fix: fix}
}

func (p *Platform) machine() tee.Finding {
	const what = "machine"
	vendor, err := p.host.CPUVendor()
	if err == nil && vendor == machineS390X {
		return found(what, "vendor_id is %s", vendor)
	}
	detail := fmt.Sprintf("vendor_id of /proc/cpuinfo is %q", vendor)
	if err != nil {
		detail = err.Error()
	}
	return missing(what, "use IBM z15 or LinuxONE III, or a later model", "Secure Execution is of s390x: %s", detail)
}

func (p *Platform) facilities() tee.Finding {
	const what = "CPU facilities"
	const fix = "use IBM z15 or LinuxONE III or later with the feature code for Secure Execution (0115), in an LPAR: a host that is a VM " +
		"itself does not have them"
	have, err := p.host.Facilities()
	if err != nil {
		return missing(what, fix, "%v", err)
	}
	if !slices.Contains(have, facilityUltravisor) {
		return missing(what, fix, "facility %d (ultravisor call) is not in /proc/cpuinfo", facilityUltravisor)
	}
	if !slices.Contains(have, facilityUnpack) {
		// A host's kernel may keep it to the guests' CPU model.
		return tee.Finding{What: what, Result: tee.Note, Detail: fmt.Sprintf("facility %d is there; %d (unpack) is not shown by this kernel, "+
			"KVM tells below", facilityUltravisor, facilityUnpack)}
	}
	return found(what, "%d (ultravisor call) and %d (unpack)", facilityUltravisor, facilityUnpack)
}

func (p *Platform) ultravisor() tee.Finding {
	const what = "ultravisor"
	const fix = "add " + kernelParam + " to the host kernel's command line (zipl.conf, then zipl) and restart"
	value, ok, err := p.host.ReadFile(uvHost)
	switch {
	case err != nil:
		return missing(what, fix, "%v", err)
	case ok && value == "1":
		return found(what, "%s is 1", uvHost)
	}
	if guest, _, _ := p.host.ReadFile(uvGuest); guest == "1" {
		return missing(what, "run pods on the host itself", "this host is a Secure Execution guest, which has no guests of its own")
	}
	line, _, err := p.host.ReadFile("/proc/cmdline")
	if err != nil {
		return missing(what, fix, "%v", err)
	}
	if slices.ContainsFunc(strings.Fields(line), func(w string) bool {
		return slices.Contains([]string{kernelParam, "prot_virt=on",
			"prot_virt=y"}, w)
	}) {
		return missing(what, "look into the kernel's log for \"prot_virt\": the reservation of memory for the ultravisor may have failed, and "+
			"kdump kernels refuse it",
			"%s is not 1 although the kernel's command line has prot_virt", uvHost)
	}
	return missing(what, fix, "%s is not 1 and the kernel's command line has no %s", uvHost, kernelParam)
}

func (p *Platform) kvm(a hypervisor.Accelerator) tee.Finding {
	const what = "KVM"
	if a != "" && a != hypervisor.AccelKVM {
		return missing(what, `set hypervisor.accel to "kvm" or "auto"`, "the accelerator is %s; an emulated CPU has no ultravisor", a)
	}
	v, err := p.host.KVMExtension(hostprobe.CapS390Protected)
	switch {
	case err != nil:
		return missing(what, "load the module kvm and give this user access to /dev/kvm", "%v", err)
	case v < 1:
		return missing(what, "use a host kernel 5.7 or later, started with "+kernelParam, "KVM_CAP_S390_PROTECTED is %d", v)
	}
	return found(what, "KVM_CAP_S390_PROTECTED is %d", v)
}

func (p *Platform) image() tee.Finding {
	const what = "image"
	info, err := p.inspect()
	if err != nil {
		return missing(what, "make an image with `cloister image se build` and name it in tee.se.image", "%v", err)
	}
	return found(what, "%s: tag %s, %d key slots", p.cfg.Image, info.Tag, len(info.HostKeyHashes))
}

// hostKey compares the firmware's hashes with the image's slots, so that an image for another machine is found before it
// is tried (the ultravisor's answer would be 0x108).
func (p *Platform) hostKey() tee.Finding {
	const what = "host key"
	info, err := p.inspect()
	if err != nil {
		return missing(what, "make the image usable first", "no image to compare with")
	}
	var image []string
	for _, h := range info.HostKeyHashes {
		image = append(image, h.String())
	}
	slots := strings.Join(image, ", ")
	text, ok, err := p.host.ReadFile(uvKeys)
	switch {
	case err != nil:
		return missing(what, "give this user access to "+uvKeys, "%v", err)
	case !ok:
		return tee.Finding{What: what, Result: tee.Note, Detail: fmt.Sprintf("this kernel has no %s (newer ones have it), so that the host's "+
			"keys are not known; the image is for %s", uvKeys, slots)}
	}
	host, err := parseHostKeys(text)
	if err != nil {
		return missing(what, "report this: the format of the file is not the known one", "%s: %v", uvKeys, err)
	}
	for _, h := range host {
		if slices.Contains(image, h) {
			return found(what, "the image has a slot for this machine's key %s", h)
		}
	}
	return missing(what, "get this machine's host key document from IBM Resource Link, and build the image with it",
		"the image is for %s, this machine has %s", slots, strings.Join(host, ", "))
}

// parseHostKeys reads lines of a hash in hexadecimal digits; unused places are zeros.
func parseHostKeys(text string) ([]string, error) {
	var out []string
	lines := strings.Fields(text)
	if len(lines) > maxHostKeys {
		return nil, fmt.Errorf("%d lines, at most %d are known", len(lines), maxHostKeys)
	}
	for _, line := range lines {
		line = strings.ToLower(strings.TrimPrefix(line, "0x"))
		if b, err := hex.DecodeString(line); err != nil || len(b) != hashDigits/2 {
			return nil, fmt.Errorf("%q is no hash of %d hexadecimal digits", line, hashDigits)
		}
		if strings.Trim(line, "0") != "" {
			out = append(out, line)
		}
	}
	if out == nil {
		return nil, errors.New("it lists no key")
	}
	return out, nil
}
