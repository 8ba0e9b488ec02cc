// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// checkNode looks at what every pod needs.
func checkNode() []finding {
	return []finding{
		{What: "configuration", Result: good},
		openable("tap devices", "/dev/net/tun", "load the module tun"),
		checkCgroups(),
	}
}

func checkCgroups() finding {
	const what = "cgroups"
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	switch {
	case err != nil:
		return finding{What: what, Result: bad, Detail: err.Error(), Fix: "mount /proc"}
	case len(mounts) == 0:
		return finding{What: what, Result: bad, Detail: "no cgroup hierarchy is mounted", Fix: "mount cgroup2 at /sys/fs/cgroup"}
	case slices.ContainsFunc(mounts, func(m *mountinfo.Info) bool { return m.FSType == "cgroup" }):
		return finding{What: what, Result: good, Detail: "version 1, or both versions"}
	}
	return finding{What: what, Result: good, Detail: "version 2"}
}

// checkPlatform looks at what pods of one platform need beside that. What the configuration says against the platform is
// told, and the host is looked at all the same.
func checkPlatform(ctx context.Context, node *configs.Config, name tee.Name) platformCheck {
	p := platformCheck{Platform: name, Description: name.Describe(), Findings: []finding{}}
	add := func(f ...finding) { p.Findings = append(p.Findings, f...) }
	cfg, err := node.WithPlatform(string(name))
	if err != nil {
		add(faults("configuration", err)...)
	}
	if cfg == nil {
		return p
	}
	noImage := name == tee.SE && cfg.TEE.SE.Image == "" // told above
	if noImage {
		cfg.TEE.SE.Image = "/var/lib/cloister/se.img"
	} else if err := cfg.CheckFiles(); err != nil {
		add(faults("files", err)...)
	} else if image := cfg.SealedImage(); image != "" {
		add(finding{What: "guest image", Result: good, Detail: image})
	} else {
		add(finding{What: "guest image", Result: good, Detail: cfg.Hypervisor.Kernel + ", " + cfg.Hypervisor.Initrd})
	}
	add(checkQEMU(ctx, cfg, name)...)
	add(checkVsock(cfg, name))
	if !name.Confidential() {
		add(checkVirtiofsd(cfg)...)
	}
	t, err := platform.New(cfg)
	if err != nil {
		if missing(p.Findings) == 0 { // else it is among the faults
			add(finding{What: "platform", Result: bad, Detail: err.Error(), Fix: "correct the settings that are named"})
		}
		return p
	}
	for _, f := range t.Probe(ctx, vc.ProbeHost(ctx, cfg)) {
		add(finding{What: f.What, Result: result(f.Result), Detail: oneLine(f.Detail), Fix: f.Fix})
	}
	if missing(p.Findings) == 0 {
		add(checkLaunch(ctx, cfg))
	}
	return p
}

func result(r tee.Result) string {
	switch r {
	case tee.OK:
		return good
	case tee.Note:
		return note
	}
	return bad
}

// oneLine keeps what others said in a line of its own.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(s, "\n", "; ")), " ")
}

// checkLaunch goes the way of a pod's start up to the command line: what it would be refused for shows here.
func checkLaunch(ctx context.Context, cfg *configs.Config) finding {
	const what = "launch"
	v, err := planPod(ctx, cfg, defaultPod())
	if err != nil {
		return finding{What: what, Result: bad, Detail: oneLine(err.Error()), Fix: "correct what is named"}
	}
	if len(v.Refused) > 0 {
		return finding{What: what, Result: bad, Detail: oneLine(strings.Join(v.Refused, "\n")), Fix: "correct what is named"}
	}
	if v.CommandError != "" {
		return finding{What: what, Result: bad, Detail: oneLine(v.CommandError), Fix: "install a QEMU that has it, or set hypervisor.path"}
	}
	return finding{What: what, Result: good, Detail: fmt.Sprintf("a pod would get %s of model %s and %d MiB (cloister plan)",
		plural(v.Document.CPU.Count, "CPU"), v.Document.CPU.Model, v.Document.Memory.Bytes>>20)}
}

func checkQEMU(ctx context.Context, cfg *configs.Config, name tee.Name) []finding {
	path, err := cfg.QEMU()
	if err != nil {
		return nil // among the files already
	}
	driver, err := qemu.New(ctx, qemu.Config{Path: path, Arch: hypervisor.Architecture(cfg.Architecture())})
	if err != nil {
		return []finding{{What: "QEMU", Result: bad, Detail: oneLine(err.Error()), Fix: "set hypervisor.path to a QEMU that runs on this node, for guests of " + cfg.Architecture()}}
	}
	features := driver.Features()
	findings := []finding{
		{What: "QEMU", Result: good, Detail: fmt.Sprintf("%s, %s", driver.Path(), strings.TrimSpace(features.Version))},
		{What: "QEMU's features", Result: good, Detail: describeFeatures(features)},
	}
	if name.Protected() {
		return findings // the platform itself says what it needs of KVM
	}
	accel, err := driver.Accelerator(cfg.Hypervisor.Accel)
	switch {
	case err != nil:
		return append(findings, finding{What: "accelerator", Result: bad, Detail: err.Error(), Fix: `set hypervisor.accel = "auto", or mend what is named`})
	case accel == hypervisor.AccelTCG:
		detail := "tcg: the guest is emulated, about ten times slower"
		if _, err := driver.Accelerator(configs.AccelKVM); err != nil {
			detail += "; no KVM: " + err.Error()
		}
		return append(findings, finding{What: "accelerator", Result: note, Detail: detail})
	default:
		return append(findings, finding{What: "accelerator", Result: good, Detail: string(accel)})
	}
}

func describeFeatures(f qemu.Features) string {
	words := append([]string{f.Machine}, f.Types...)
	if f.Sandbox {
		words = append(words, "seccomp")
	}
	if f.ExitWithParent {
		words = append(words, "exit-with-parent")
	}
	return strings.Join(words, " ")
}

func checkVsock(cfg *configs.Config, name tee.Name) finding {
	const device = "/dev/vhost-vsock"
	kernel := openable("vsock", device, "load the module vhost_vsock, or set hypervisor.vsock")
	if cfg.Hypervisor.Vsock == configs.VsockVhost {
		return kernel
	}
	if cfg.Hypervisor.Vsock == configs.VsockAuto && (kernel.Result == good || name.Protected()) {
		// The embedded device maps the guest's memory, which a protected guest does not show.
		return kernel
	}
	return finding{What: "vsock", Result: good, Detail: "the shim's own vhost-user device"}
}

func checkVirtiofsd(cfg *configs.Config) []finding {
	_, err := cfg.VirtiofsdPath()
	if err == nil {
		return []finding{{What: "virtiofsd", Result: good}}
	}
	found := faults("virtiofsd", err)
	for i := range found {
		found[i].Result = note
		found[i].Detail += " (only pods that mount folders of the host need it; in Kubernetes nearly all do)"
	}
	return found
}

func openable(what, path, fix string) finding {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return finding{What: what, Result: bad, Detail: err.Error(), Fix: fix}
	}
	_ = f.Close()
	return finding{What: what, Result: good, Detail: path}
}
