// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// AccelAuto asks for KVM where the CPU has hardware virtualization, else emulation.
const AccelAuto = "auto"

// host is what the choice of the accelerator looks at.
type host struct {
	kvm     string // /dev/kvm
	cpuinfo string // /proc/cpuinfo
}

// accelerator chooses by the rule that a KVM without hardware behind it is none: there are software KVMs, which open but
// hang with stock kernels.
func (h host) accelerator(want string, f Features) (hypervisor.Accelerator, error) {
	switch want {
	case string(hypervisor.AccelTCG):
		if !slices.Contains(f.Types, "tcg-accel") {
			return "", &Missing{What: []string{"emulation (tcg)"}}
		}
		return hypervisor.AccelTCG, nil
	case string(hypervisor.AccelKVM):
		if err := h.kvmUsable(f); err != nil {
			return "", fmt.Errorf("KVM is asked for (hypervisor.accel) and cannot be used: %w", err)
		}
		return hypervisor.AccelKVM, nil
	case AccelAuto, "":
		err := h.kvmUsable(f)
		if err == nil {
			return hypervisor.AccelKVM, nil
		}
		if !slices.Contains(f.Types, "tcg-accel") {
			return "", fmt.Errorf("this QEMU cannot emulate and KVM cannot be used: %w", err)
		}
		return hypervisor.AccelTCG, nil
	}
	return "", fmt.Errorf("accelerator %q is neither auto, kvm nor tcg: %w", want, errdefs.ErrInvalidArgument)
}

func (h host) kvmUsable(f Features) error {
	if !slices.Contains(f.Types, "kvm-accel") {
		return &Missing{What: []string{"KVM"}}
	}
	flag, err := virtualizationFlag(h.cpuinfo)
	if err != nil {
		return err
	}
	if flag == "" {
		return fmt.Errorf("the CPU offers no hardware virtualization (no vmx, svm or sie in %s): enable it in the firmware or, in a VM, "+
			"nested virtualization: %w",
			h.cpuinfo, errdefs.ErrUnavailable)
	}
	k, err := os.OpenFile(h.kvm, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("%w: load the module kvm_intel or kvm_amd, and give this user access to the device (%w)", err, errdefs.ErrUnavailable)
	}
	return k.Close()
}

// virtualizationFlag looks at the first CPU only: vmx (Intel), svm (AMD), sie (s390x, in the line "features").
func virtualizationFlag(cpuinfo string) (string, error) {
	f, err := os.Open(cpuinfo)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		name, value, ok := strings.Cut(s.Text(), ":")
		if name = strings.TrimSpace(name); !ok || (name != "flags" && name != "features") {
			continue
		}
		for flag := range strings.FieldsSeq(value) {
			if flag == "vmx" || flag == "svm" || flag == "sie" {
				return flag, nil
			}
		}
		return "", nil
	}
	return "", s.Err()
}

// DefaultCPU implements hypervisor.Driver.
func (*Driver) DefaultCPU(a hypervisor.Accelerator) string {
	if a == hypervisor.AccelKVM {
		return "host"
	}
	return "max"
}
