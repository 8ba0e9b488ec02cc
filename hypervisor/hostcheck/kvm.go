// SPDX-License-Identifier: Apache-2.0

package hostcheck

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
)

// KVM is where the host's KVM is looked for.
type KVM struct {
	Device  string // /dev/kvm
	CPUInfo string // /proc/cpuinfo
}

// HostKVM is where Linux has it.
func HostKVM() KVM { return KVM{Device: "/dev/kvm", CPUInfo: "/proc/cpuinfo"} }

// Usable returns nil if the CPU has hardware virtualization and this process may use KVM, else what is missing
// (errdefs.ErrUnavailable). A KVM without hardware behind it counts as none: there are software KVMs, which open but hang with
// stock kernels.
func (k KVM) Usable() error {
	flag, err := virtualizationFlag(k.CPUInfo)
	if err != nil {
		return err
	}
	if flag == "" {
		return fmt.Errorf("the CPU offers no hardware virtualization (no vmx, svm or sie in %s): enable it in the firmware or, in a VM, "+
			"nested virtualization: %w",
			k.CPUInfo, errdefs.ErrUnavailable)
	}
	f, err := os.OpenFile(k.Device, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("%w: load the module kvm_intel or kvm_amd, and give this user access to the device (%w)", err, errdefs.ErrUnavailable)
	}
	return f.Close()
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
