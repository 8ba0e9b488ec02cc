// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/tee/abi"
)

// Describe implements hypervisor.Driver. Disks are taken for regular files: they are not looked at.
func (d *Driver) Describe(ctx context.Context, doc hypervisor.Document) (hypervisor.Invocation, error) {
	if err := d.Validate(doc); err != nil {
		return hypervisor.Invocation{}, err
	}
	b, err := d.open(ctx)
	if err != nil {
		return hypervisor.Invocation{}, err
	}
	return describe(doc, b)
}

func describe(doc hypervisor.Document, b *program) (hypervisor.Invocation, error) {
	drivers := make(map[string]string, len(doc.Disks))
	for _, disk := range doc.Disks {
		drivers[disk.ID] = driverFile
	}
	line, err := newCommandLine(doc, b.features, drivers)
	if err != nil {
		return hypervisor.Invocation{}, err
	}
	i := hypervisor.Invocation{Binary: b.path, Args: line.args}
	for n, name := range line.files {
		i.Files = append(i.Files, hypervisor.InheritedFile{FD: supervise.FirstInheritedFD + n, Name: name, What: describeFile(name)})
	}
	return i, nil
}

// describeFile says for people what is behind an inherited file.
func describeFile(name string) string {
	switch name {
	case fileQMP:
		return "socket to the shim: control (QMP)"
	case fileConsole:
		return "socket to the shim: the guest's console"
	case fileVsock:
		return "vsock: /dev/vhost-vsock, or a socket to the shim's own device"
	}
	if id, ok := strings.CutPrefix(name, fileTap); ok {
		return "tap of the network interface " + id
	}
	if id, ok := strings.CutPrefix(name, fileVhost); ok {
		return "/dev/vhost-net for the network interface " + id
	}
	return name
}

// details are the features in words, for people.
func (f Features) details() []string {
	words := append([]string{f.Machine}, f.Types...)
	if f.Sandbox {
		words = append(words, "seccomp")
	}
	if f.ExitWithParent {
		words = append(words, "exit-with-parent")
	}
	return words
}

// platformTypes are the objects of the platforms that QEMU launches, and the QEMU to install for each.
var platformTypes = map[abi.Platform]struct{ object, wanted string }{
	abi.SNP: {typeSNP, "9.1 or newer (Debian 12: qemu-system-x86 of bookworm-backports)"},
	abi.TDX: {typeTDX, "10.1 or newer"},
	abi.SE:  {typeSE, "5.2 or newer of an s390x distribution: builds without KVM do not have it"},
}

// platforms says of each platform what the binary lacks; empty: nothing.
func (f Features) platforms() map[abi.Platform]string {
	lacks := make(map[abi.Platform]string, len(platformTypes))
	for p, t := range platformTypes {
		lacks[p] = ""
		if !f.has(t.object) {
			lacks[p] = fmt.Sprintf("this QEMU has no object type %s; install QEMU %s", t.object, t.wanted)
		}
	}
	return lacks
}
