// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
)

// Results of a check.
const (
	good = "ok"
	note = "note" // works, but a user may want to know
	bad  = "MISSING"
)

// finding is one line of the check.
type finding struct {
	What   string `json:"what"`
	Result string `json:"result"`
	Detail string `json:"detail,omitempty"`
	Fix    string `json:"fix,omitempty"`
}

func checkCommand() *cobra.Command {
	var (
		path   string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Tell what this node offers for running pods and what is missing, each line with the fix",
		Long: "check reads the configuration as the shim does and looks at what pods need on this node.\n" +
			"It starts no VM and changes nothing. The exit status is 1 if something that pods need is missing.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := check(cmd.Context(), path)
			if err := report(cmd.OutOrStdout(), findings, asJSON); err != nil {
				return err
			}
			missing := 0
			for _, f := range findings {
				if f.Result == bad {
					missing++
				}
			}
			if missing > 0 {
				return fmt.Errorf("%d of %d checks failed: pods will not start", missing, len(findings))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "configuration file (default: as the shim: "+configs.DefaultPath+", else built in)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func report(w io.Writer, findings []finding, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(findings)
	}
	for _, f := range findings {
		if _, err := fmt.Fprintf(w, "%-8s %-14s %s\n", f.Result, f.What, f.Detail); err != nil {
			return err
		}
		if f.Fix != "" {
			if _, err := fmt.Fprintf(w, "%-8s %-14s   fix: %s\n", "", "", f.Fix); err != nil {
				return err
			}
		}
	}
	return nil
}

// check looks at everything in the order in which a pod's start needs it.
func check(ctx context.Context, path string) []finding {
	cfg, err := configs.Load(path)
	if err != nil {
		return faults("configuration", err)
	}
	findings := []finding{{What: "configuration", Result: good}}
	if err := cfg.CheckFiles(); err != nil {
		findings = append(findings, faults("files", err)...)
	} else {
		findings = append(findings, finding{What: "guest image", Result: good, Detail: cfg.Hypervisor.Kernel + ", " + cfg.Hypervisor.Initrd})
	}
	findings = append(findings, checkQEMU(ctx, cfg)...)
	if _, err := cfg.VirtiofsdPath(); err != nil {
		for _, f := range faults("virtiofsd", err) {
			f.Result = note
			f.Detail += " (only pods that mount folders of the host need it; in Kubernetes nearly all do)"
			findings = append(findings, f)
		}
	} else {
		findings = append(findings, finding{What: "virtiofsd", Result: good})
	}
	findings = append(findings, openable("tap devices", "/dev/net/tun", "load the module tun"), checkVsock(cfg))
	// Said outright, so that nobody takes this for more than it is.
	return append(findings, finding{What: "tee", Result: note, Detail: "none: pods run in ordinary VMs, whose memory the host can read"})
}

func checkQEMU(ctx context.Context, cfg *configs.Config) []finding {
	path, err := cfg.QEMU()
	if err != nil {
		return nil // among the files already
	}
	driver, err := qemu.New(ctx, qemu.Config{Path: path})
	if err != nil {
		return []finding{{What: "QEMU", Result: bad, Detail: err.Error(), Fix: "set hypervisor.path to a QEMU that runs on this node"}}
	}
	findings := []finding{{What: "QEMU", Result: good, Detail: fmt.Sprintf("%s, %s", driver.Path(), driver.Features().Version)}}
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

func checkVsock(cfg *configs.Config) finding {
	const device = "/dev/vhost-vsock"
	kernel := openable("vsock", device, "load the module vhost_vsock, or set hypervisor.vsock")
	switch cfg.Hypervisor.Vsock {
	case configs.VsockVhost:
		return kernel
	case configs.VsockAuto:
		if kernel.Result == good {
			return kernel
		}
	}
	return finding{What: "vsock", Result: good, Detail: "the shim's own vhost-user device"}
}

func openable(what, path, fix string) finding {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return finding{What: what, Result: bad, Detail: err.Error(), Fix: fix}
	}
	_ = f.Close()
	return finding{What: what, Result: good, Detail: path}
}

// faults turns an error of package configs into a line each.
func faults(what string, err error) []finding {
	var all configs.Faults
	if !errors.As(err, &all) {
		return []finding{{What: what, Result: bad, Detail: err.Error()}}
	}
	out := make([]finding, 0, len(all))
	for _, f := range all {
		detail := f.Reason
		if f.Key != "" {
			detail = f.Key + ": " + detail
		}
		if f.File != "" {
			detail = f.File + ": " + detail
		}
		out = append(out, finding{What: what, Result: bad, Detail: detail, Fix: f.Fix})
	}
	return out
}
