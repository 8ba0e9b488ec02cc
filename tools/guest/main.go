// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	var in inputs
	flags := flag.NewFlagSet("guest", flag.ContinueOnError)
	flags.StringVar(&in.Arch, "arch", "amd64", "architecture of the guest: amd64 or s390x")
	flags.StringVar(&in.Kernel, "kernel", "", "path of the kernel, a bzImage or a raw image for s390x")
	flags.StringVar(&in.Modules, "modules", "", "directory of the kernel's modules, lib/modules/RELEASE")
	flags.StringVar(&in.Agent, "agent", "", "path of the agent, a static executable")
	flags.StringVar(&in.Out, "out", "", "directory that gets vmlinuz, initrd.img and guest.json")
	flags.StringVar(&in.Version, "version", "", "version of the agent, for the manifest")
	flags.StringVar(&in.Compression, "compression", defaultCompression, "of the initrd: none, gzip or zstd")
	flags.BoolVar(&in.KeepSignatures, "keep-signatures", false, "keep the modules' signatures, for a kernel that demands them")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for _, f := range []struct{ name, value string }{
		{"kernel", in.Kernel}, {"modules", in.Modules}, {"agent", in.Agent}, {"out", in.Out}, {"version", in.Version},
	} {
		if f.value == "" {
			return fmt.Errorf("flag -%s is missing", f.name)
		}
	}
	m, err := build(in)
	if err != nil {
		return err
	}
	fmt.Printf("guest image for %s in %s: kernel %s %d bytes, initrd %d bytes (%d unpacked), %d modules\n",
		m.Architecture, in.Out, m.Kernel.Release, m.Kernel.Size, m.Initrd.Size, m.Initrd.UnpackedSize, len(m.Modules))
	return nil
}
