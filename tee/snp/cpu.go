// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// cpuFamily is one of QEMU's CPU models with its versions. All versions of a model have the same signature: they differ in
// features only (QEMU target/i386/cpu.c; a test asks the binary).
type cpuFamily struct {
	name                    string
	family, model, stepping uint32
	versions                int
}

var cpuFamilies = [...]cpuFamily{
	{"EPYC", 23, 1, 2, 5},
	{"EPYC-Rome", 23, 49, 0, 5},
	{"EPYC-Milan", 25, 1, 1, 4},
	{"EPYC-Genoa", 25, 17, 0, 3},
	{"EPYC-Turin", 26, 0, 0, 2},
}

// ibpb is an alias of EPYC-v2.
const ibpb = "EPYC-IBPB"

// signature is EAX of CPUID function 1: AMD64 Architecture Programmer's Manual volume 3, E.3.2.
func (f cpuFamily) signature() uint32 {
	const base = 0xf
	low := f.model&0xf<<4 | f.stepping
	if f.family <= base {
		return f.model>>4<<16 | f.family<<8 | low
	}
	return (f.family-base)<<20 | f.model>>4<<16 | base<<8 | low
}

// CPUSignature is what a CPU model puts into the measured state of each virtual CPU: EAX of CPUID function 1.
// Features may follow the model's name, as QEMU's -cpu takes them, but nothing that changes the signature.
// errdefs.ErrInvalidArgument: the model has no fixed one, or it is not known.
func CPUSignature(model string) (uint32, error) {
	model, options, _ := strings.Cut(model, ",")
	for o := range strings.SplitSeq(options, ",") {
		name, _, _ := strings.Cut(o, "=")
		if slices.Contains([]string{"family", "model", "stepping"}, strings.TrimLeft(name, "+-")) {
			return 0, fmt.Errorf("CPU option %q changes the signature of model %s, which is part of the measurement; leave it out: %w", o, model,
				errdefs.ErrInvalidArgument)
		}
	}
	if model == ibpb {
		model = "EPYC"
	}
	for _, f := range cpuFamilies {
		if slices.Contains(f.names(), model) {
			return f.signature(), nil
		}
	}
	switch model {
	case "", "host", "max":
		return 0, fmt.Errorf("CPU model %q depends on the machine and is part of the measurement; name one of %s (hypervisor.cpu_model): %w",
			model, strings.Join(CPUModels(), ", "), errdefs.ErrInvalidArgument)
	}
	return 0, fmt.Errorf("CPU model %q has no known signature, which is part of the measurement; known are %s (hypervisor.cpu_model): %w",
		model, strings.Join(CPUModels(), ", "), errdefs.ErrInvalidArgument)
}

// CPUModels lists the models that CPUSignature knows.
func CPUModels() []string {
	names := []string{ibpb}
	for _, f := range cpuFamilies {
		names = append(names, f.names()...)
	}
	slices.Sort(names)
	return names
}

func (f cpuFamily) names() []string {
	names := []string{f.name}
	for v := range f.versions {
		names = append(names, fmt.Sprintf("%s-v%d", f.name, v+1))
	}
	return names
}
