// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
)

// accelerator chooses for what is asked for.
func accelerator(want string, f Features, host hostcheck.KVM) (hypervisor.Accelerator, error) {
	emulates := slices.Contains(f.Types, "tcg-accel")
	switch want {
	case string(hypervisor.AccelTCG):
		if !emulates {
			return "", &Missing{What: []string{"emulation (tcg)"}}
		}
		return hypervisor.AccelTCG, nil
	case string(hypervisor.AccelKVM):
		if err := kvmUsable(f, host); err != nil {
			return "", fmt.Errorf("KVM is asked for (hypervisor.accel) and cannot be used: %w", err)
		}
		return hypervisor.AccelKVM, nil
	case hypervisor.AccelAuto, "":
		err := kvmUsable(f, host)
		if err == nil {
			return hypervisor.AccelKVM, nil
		}
		if !emulates {
			return "", fmt.Errorf("this QEMU cannot emulate and KVM cannot be used: %w", err)
		}
		return hypervisor.AccelTCG, nil
	}
	return "", fmt.Errorf("accelerator %q is neither auto, kvm nor tcg: %w", want, errdefs.ErrInvalidArgument)
}

func kvmUsable(f Features, host hostcheck.KVM) error {
	if !slices.Contains(f.Types, "kvm-accel") {
		return &Missing{What: []string{"KVM"}}
	}
	return host.Usable()
}

// DefaultCPU implements hypervisor.Driver.
func (*Driver) DefaultCPU(a hypervisor.Accelerator) string {
	if a == hypervisor.AccelKVM {
		return "host"
	}
	return "max"
}
