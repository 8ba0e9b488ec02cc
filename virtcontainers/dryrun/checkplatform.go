// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
	"github.com/cloister-project/cloister/virtcontainers/share"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// whatVMM is the line about the VMM, ours and that of platforms with hardware behind them (tee.Host.ProbeVMM).
const whatVMM = "VMM"

// checkPlatform looks at what pods of one platform need beside that. What the configuration says against the platform is
// told, and the host is looked at all the same.
func checkPlatform(ctx context.Context, node *configs.Config, name tee.Name) PlatformCheck {
	p := PlatformCheck{Platform: name, Description: name.Describe(), Findings: []Finding{}}
	add := func(f ...Finding) { p.Findings = append(p.Findings, f...) }
	cfg, err := node.WithPlatform(string(name))
	if err != nil {
		add(faults("configuration", err)...)
		return p
	}
	plan, err := planHost(cfg)
	if err != nil {
		add(faults("configuration", err)...)
		if plan, err = planHost(neutral(cfg, name)); err != nil {
			return p
		}
	}
	if name != tee.SE || cfg.TEE.SE.Image != "" { // else told above
		add(checkFiles(cfg, plan)...)
	}
	found, asked := checkVMM(ctx, plan.Driver(), cfg, name)
	host := plan.Findings(ctx)
	about := func(f tee.Finding) bool { return f.What == whatVMM }
	switch {
	case !asked:
		// Ours says why.
		host = slices.DeleteFunc(host, about)
	case slices.ContainsFunc(host, about):
		found = found[1:]
	}
	add(found...)
	add(checkVsock(plan))
	if plan.Sharing().Live() {
		add(checkVirtiofsd(ctx, cfg)...)
	}
	for _, f := range host {
		add(Finding{What: f.What, Result: result(f.Result), Detail: oneLine(f.Detail), Fix: f.Fix})
	}
	if Missing(p.Findings) == 0 {
		add(checkLaunch(ctx, cfg))
	}
	return p
}

func planHost(cfg *configs.Config) (*vmplan.Plan, error) {
	return vmplan.New(vmplan.Pod{ID: PodID, Namespace: podNamespace, Config: cfg})
}

// neutral is the configuration for a look at the host where settings contradict the platform: without those that are no
// matter of the host's.
func neutral(cfg *configs.Config, name tee.Name) *configs.Config {
	n := *cfg
	n.Log.DebugConsole, n.Hypervisor.KernelParams = false, nil
	n.Hypervisor.CPUModel, n.Hypervisor.Vsock = "", configs.VsockAuto
	if base, err := configs.Defaults(); err == nil {
		snp, tdx := base.TEE.SNP, base.TEE.TDX
		snp.Firmware, snp.FirmwareDigests = n.TEE.SNP.Firmware, n.TEE.SNP.FirmwareDigests
		tdx.Firmware, tdx.FirmwareDigests = n.TEE.TDX.Firmware, n.TEE.TDX.FirmwareDigests
		n.TEE.SNP, n.TEE.TDX = snp, tdx
	}
	n.TEE.Initdata, n.TEE.InitdataAnnotation = "", ""
	if arch := name.Architecture(); arch != "" {
		n.Hypervisor.Arch = arch
	}
	if name.Protected() {
		n.Hypervisor.Accel = configs.AccelAuto
	}
	if n.TEE.SE.Image == "" {
		n.TEE.SE.Image = "/var/lib/cloister/se.img"
	}
	return &n
}

func result(r tee.Result) Result {
	switch r {
	case tee.OK:
		return Good
	case tee.Note:
		return Note
	}
	return Bad
}

func checkFiles(cfg *configs.Config, plan *vmplan.Plan) []Finding {
	if err := plan.CheckFiles(); err != nil {
		var all configs.Faults
		if !errors.As(err, &all) {
			return faults("files", err)
		}
		// The VMM has a line of its own.
		all = slices.DeleteFunc(all, func(f configs.Fault) bool { return f.Key == "hypervisor.path" })
		if len(all) > 0 {
			return faults("files", all)
		}
	}
	image := plan.Platform().SealedImage()
	if image == "" {
		image = cfg.Hypervisor.Kernel + ", " + cfg.Hypervisor.Initrd
	}
	return []Finding{{What: "guest image", Result: Good, Detail: image}}
}

// checkVMM asks the VMM's binary. The first finding is whatVMM; asked: it answered.
func checkVMM(ctx context.Context, driver hypervisor.Driver, cfg *configs.Config, name tee.Name) (findings []Finding, asked bool) {
	can, err := driver.Capabilities(ctx)
	if err != nil {
		return []Finding{{What: whatVMM, Result: Bad, Detail: oneLine(err.Error()),
			Fix: "set hypervisor.path to one that runs on this node, for guests of " + cfg.Architecture()}}, false
	}
	findings = []Finding{{What: whatVMM, Result: Good, Detail: fmt.Sprintf("%s, %s", can.Binary, can.Version)}}
	if len(can.Details) > 0 {
		findings = append(findings, Finding{What: "VMM's features", Result: Good, Detail: strings.Join(can.Details, " ")})
	}
	if cfg.Hypervisor.Sandbox && can.Sandbox != "" {
		findings = append(findings, Finding{What: "VMM's sandbox", Result: Bad, Detail: oneLine(can.Sandbox),
			Fix: "mend what is named, or do without the sandbox: hypervisor.sandbox = false"})
	}
	if name.Protected() {
		return findings, true // the platform itself says what it needs of KVM
	}
	accel, err := driver.Accelerator(ctx, cfg.Hypervisor.Accel)
	f := Finding{What: "accelerator", Result: Good, Detail: string(accel)}
	switch {
	case err != nil:
		f.Result, f.Detail, f.Fix = Bad, oneLine(err.Error()), `set hypervisor.accel = "auto", or mend what is named`
	case accel == hypervisor.AccelTCG:
		f.Result, f.Detail = Note, "tcg: the guest is emulated, about ten times slower"
		if _, err := driver.Accelerator(ctx, configs.AccelKVM); err != nil {
			f.Detail += "; no KVM: " + oneLine(err.Error())
		}
	}
	return append(findings, f), true
}

func checkVsock(plan *vmplan.Plan) Finding {
	switch plan.VsockKind() {
	case hypervisor.VsockVhost:
		return openable("vsock", vmplan.VhostVsockDevice, "load the module vhost_vsock, or set hypervisor.vsock")
	case hypervisor.VsockHybrid:
		return Finding{What: "vsock", Result: Good, Detail: "the VMM's own device"}
	}
	return Finding{What: "vsock", Result: Good, Detail: "the shim's own vhost-user device"}
}

func checkVirtiofsd(ctx context.Context, cfg *configs.Config) []Finding {
	path, err := cfg.VirtiofsdPath()
	var shortcoming string
	if err == nil {
		shortcoming, err = share.Shortcoming(ctx, path)
	}
	switch {
	case err == nil && shortcoming == "":
		return []Finding{{What: "virtiofsd", Result: Good}}
	case err == nil:
		return []Finding{{What: "virtiofsd", Result: Note, Detail: path + ": " + shortcoming}}
	}
	found := faults("virtiofsd", err)
	for i := range found {
		found[i].Result = Note
		found[i].Detail += " (only pods that mount directories of the host need it; in Kubernetes nearly all do)"
	}
	return found
}

// checkLaunch goes the way of a pod's start up to the command line: what it would be refused for shows here.
func checkLaunch(ctx context.Context, cfg *configs.Config) Finding {
	bad := func(detail, fix string) Finding {
		return Finding{What: "launch", Result: Bad, Detail: oneLine(detail), Fix: fix}
	}
	v, err := Plan(ctx, cfg, manifest.Example())
	switch {
	case err != nil:
		return bad(err.Error(), fixNamed)
	case len(v.Refused) > 0:
		return bad(strings.Join(v.Refused, "\n"), fixNamed)
	case v.Err != nil:
		return bad(v.CommandError, "install a VMM that has it, or set hypervisor.path")
	}
	cpu := v.Document.CPU
	return Finding{What: "launch", Result: Good, Detail: fmt.Sprintf("a pod would get %s of model %s and %d MiB (cloister plan)",
		plural(cpu.Count, "CPU"), cpu.Model, v.Document.Memory.Bytes>>20)}
}

// plural is for people.
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
