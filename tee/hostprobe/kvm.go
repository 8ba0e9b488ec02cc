// SPDX-License-Identifier: Apache-2.0

package hostprobe

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// KVM's capabilities that matter to the platforms: include/uapi/linux/kvm.h.
const (
	CapS390Protected      = 180 // KVM_CAP_S390_PROTECTED: Secure Execution guests
	CapMemoryAttributes   = 233 // KVM_CAP_MEMORY_ATTRIBUTES: private and shared pages; the value is a bitmap of attributes
	CapGuestMemfd         = 234 // KVM_CAP_GUEST_MEMFD: memory that the host cannot map
	CapVMTypes            = 235 // KVM_CAP_VM_TYPES: bitmap of VM types
	CapX86APICBusCyclesNS = 237 // KVM_CAP_X86_APIC_BUS_CYCLES_NS: the APIC timer's frequency can be set
)

// MemoryAttributePrivate is KVM_MEMORY_ATTRIBUTE_PRIVATE, a bit of CapMemoryAttributes' value.
const MemoryAttributePrivate = 1 << 3

// Types of VMs, as bits of CapVMTypes' value: Documentation/virt/kvm/api.rst, KVM_CREATE_VM.
const (
	VMTypeDefault           = 0
	VMTypeSoftwareProtected = 1
	VMTypeSEV               = 2
	VMTypeSEVES             = 3
	VMTypeSNP               = 4
	VMTypeTDX               = 5
)

const (
	kvmDevice         = "/dev/kvm"
	kvmCheckExtension = 0xae03 // _IO(KVMIO, 0x03)
	// vmTypeBits is how many bits of an ioctl's result, an int, say something.
	vmTypeBits = 31
	kvmHint    = "load the module kvm_intel, kvm_amd or kvm, and give this user access to /dev/kvm"
)

var vmTypeNames = [...]string{"default", "software-protected", "SEV", "SEV-ES", "SEV-SNP", "TDX"}

// Host is the machine as a tree of files.
type Host struct {
	// Root is put before all paths; "" is the machine's own tree.
	Root string
	// Extension takes the place of /dev/kvm's KVM_CHECK_EXTENSION; nil: ask the kernel. Tests set it.
	Extension func(capability int) (int, error)
}

// KVMExtension asks KVM_CHECK_EXTENSION of /dev/kvm. 0 says that the kernel does not know the capability or does not
// have it; what other values mean depends on it. The error is errdefs.ErrUnavailable and says what to do.
func (h Host) KVMExtension(capability int) (int, error) {
	if h.Extension != nil {
		return h.Extension(capability)
	}
	f, err := os.OpenFile(h.path(kvmDevice), os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("there is no %s: %s: %w", kvmDevice, "enable virtualization in the machine's firmware, "+kvmHint,
			errdefs.ErrUnavailable)
	case err != nil:
		return 0, fmt.Errorf("%w: %s (%w)", err, kvmHint, errdefs.ErrUnavailable)
	}
	defer f.Close()
	value, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), kvmCheckExtension, uintptr(capability))
	if errno != 0 {
		return 0, fmt.Errorf("KVM_CHECK_EXTENSION %d of %s: %w (%w)", capability, f.Name(), errno, errdefs.ErrUnavailable)
	}
	return int(value), nil
}

// VMTypes is the bitmap of VM types that KVM offers. A kernel that does not know the question has the default type only.
func (h Host) VMTypes() (int, error) {
	bitmap, err := h.KVMExtension(CapVMTypes)
	if err == nil && bitmap == 0 {
		bitmap = 1 << VMTypeDefault
	}
	return bitmap, err
}

// DescribeVMTypes names the VM types of a bitmap: "{default, SEV-SNP}".
func DescribeVMTypes(bitmap int) string {
	var names []string
	for bit := range vmTypeBits {
		switch {
		case bitmap&(1<<bit) == 0:
		case bit < len(vmTypeNames):
			names = append(names, vmTypeNames[bit])
		default:
			names = append(names, "type "+strconv.Itoa(bit))
		}
	}
	return "{" + strings.Join(names, ", ") + "}"
}
