// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

func measureCommand() *cobra.Command {
	var (
		f                        nodeFlags
		acpi                     acpiFlags
		file, vcpus, models      string
		firmware, kernel, initrd string
	)
	cmd := &cobra.Command{
		Use:   "measure",
		Short: "Predict what the hardware will report of the VMs that this node's configuration would start",
		Long: "measure computes reference values for a verifier by the code that launches pods: the launch digest of SEV-SNP, the\n" +
			"registers of TDX, the tag and digests of a Secure Execution image. It works on any machine that has the files; no\n" +
			"hardware is asked, and nothing is started but what --acpi-from-qemu starts.\n\n" +
			"The values hold for a number of virtual CPUs and, with SEV-SNP, for a CPU model: --vcpus and --cpu-model take several\n" +
			"at once. Without them they are those of the pod, or of a pod without limits.\n\n" + strings.TrimSpace(acpiHelp),
		Example: "  cloister measure --tee snp --vcpus 1-8 --cpu-model EPYC-v4,EPYC-Milan\n" +
			"  cloister measure --tee tdx -f pod.yaml --json\n" +
			"  cloister measure --tee tdx --vcpus 1-4 --acpi-from-qemu --nics 1",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var v dryrun.Variants
			var err error
			if v.VCPUs, err = parseCounts(vcpus); err != nil {
				return err
			}
			if v.Models, err = parseModels(models); err != nil {
				return err
			}
			if err := checkName(f.tee); err != nil {
				return err
			}
			if n := max(len(v.VCPUs), 1) * max(len(v.Models), 1); n > dryrun.MaxVariants {
				return usage("%d numbers of CPUs and %d models are %d variants; at most %d are computed at once",
					len(v.VCPUs), len(v.Models), n, dryrun.MaxVariants)
			}
			p, err := readPod(file, cmd.InOrStdin())
			if err != nil {
				return err
			}
			f.tee, _ = dryrun.PlatformOf(f.tee, p)
			cfg, err := f.load()
			if err != nil {
				return err
			}
			replaced := *cfg
			for _, r := range []struct {
				flag, path string
				to         *string
			}{
				{"firmware", firmware, firmwareOf(&replaced)},
				{"kernel", kernel, &replaced.Hypervisor.Kernel},
				{"initrd", initrd, &replaced.Hypervisor.Initrd},
			} {
				if r.path == "" {
					continue
				}
				if *r.to, err = filepath.Abs(r.path); err != nil {
					return usage("--%s: %w", r.flag, err)
				}
			}
			if v.Tables, err = acpi.tables(cmd, &replaced); err != nil {
				return err
			}
			m, err := dryrun.Measure(cmd.Context(), &replaced, p, v)
			if err != nil {
				return err
			}
			if m.AnyCPUs && len(v.VCPUs) > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "cloister: --vcpus changes nothing: the values of %s do not depend on the number of CPUs\n", m.Platform)
			}
			for _, u := range m.Unpredicted() {
				fmt.Fprintf(cmd.ErrOrStderr(), "cloister: %s is not predicted: %s\n", u.Name, u.Reason)
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return printMeasurement(cmd.OutOrStdout(), m)
		},
	}
	f.add(cmd, "measure for this platform: snp, tdx or se (default: the pod's or the configured one)")
	cmd.Flags().StringVar(&vcpus, "vcpus", "", "numbers of virtual CPUs, for example 1-8 or 1,2,4")
	cmd.Flags().StringVar(&models, "cpu-model", "", "CPU models, separated by commas (default: hypervisor.cpu_model, EPYC-v4 with snp)")
	cmd.Flags().StringVarP(&file, "file", "f", "", "manifest of a Pod, YAML or JSON; - is standard input (default: a pod without limits)")
	cmd.Flags().StringVar(&firmware, "firmware", "",
		"firmware image in place of the configured one; its digest must be among firmware_digests")
	cmd.Flags().StringVar(&kernel, "kernel", "", "kernel in place of hypervisor.kernel")
	cmd.Flags().StringVar(&initrd, "initrd", "", "initrd in place of hypervisor.initrd")
	acpi.add(cmd)
	return cmd
}

// parseCounts takes "1-4,8".
func parseCounts(text string) ([]int, error) {
	if text == "" {
		return nil, nil
	}
	var counts []int
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		low, err1 := strconv.Atoi(from)
		high, err2 := strconv.Atoi(to)
		if err1 != nil || err2 != nil || low < 1 || high < low || high > dryrun.MaxVariants {
			return nil, usage("--vcpus %q: %q is no number of CPUs such as 4 and no range such as 1-8", text, part)
		}
		for n := low; n <= high; n++ {
			if !slices.Contains(counts, n) {
				counts = append(counts, n)
			}
		}
	}
	return counts, nil
}

func parseModels(text string) ([]string, error) {
	if text == "" {
		return nil, nil
	}
	var models []string
	for m := range strings.SplitSeq(text, ",") {
		if m == "" || strings.ContainsAny(m, " =") {
			return nil, usage("--cpu-model %q: %q is no CPU model", text, m)
		}
		if !slices.Contains(models, m) {
			models = append(models, m)
		}
	}
	return models, nil
}

func printMeasurement(w io.Writer, m *dryrun.Measurement) error {
	out := printer{w: w}
	out.line("platform  %s", m.Description)
	if m.Emulated {
		out.line("          Predicted from files and from what an emulated VM gets of its VMM; no hardware was asked.")
	} else {
		out.line("          Predicted from files; no hardware was asked, nothing was launched.")
	}
	first := m.ReferenceValues[0]
	for _, in := range first.Inputs {
		out.line("%-9s %s\n          sha256 %s", in.Role, in.Path, in.SHA256)
	}
	if first.Parameters != "" {
		out.line("cmdline   %s", first.Parameters)
	}
	for _, r := range rows(m.ReferenceValues) {
		out.line("\n%s%s", r.name, noteOf(r.note))
		if r.same && len(r.of) == len(m.ReferenceValues) && !slices.Contains(sized, r.name) {
			out.line("  %s", r.of[0].hex)
			continue
		}
		for _, v := range r.of {
			out.line("  %-14s %-9s %s", v.model, plural(v.vcpus, "vCPU"), v.hex)
		}
	}
	return out.err
}

// row is one register of all variants for which it is predicted.
type row struct {
	name, note string
	of         []variantValue
	// same: it has one value for all of them.
	same bool
}

type variantValue struct {
	model string
	vcpus int
	hex   string
}

// rows are the registers in the order of the variants that have them. A name can stand for more than one value (the key
// slots of an image): the first are one row, the second another.
func rows(all []tee.ReferenceValues) []*row {
	type key struct {
		name string
		nth  int
	}
	found := make(map[key]*row)
	var list []*row
	for _, r := range all {
		seen := make(map[string]int)
		for _, v := range r.Values {
			k := key{v.Name, seen[v.Name]}
			seen[v.Name]++
			one := found[k]
			if one == nil {
				one = &row{name: v.Name, note: v.Note, same: true}
				found[k] = one
				list = append(list, one)
			}
			one.of = append(one.of, variantValue{r.CPUModel, r.VCPUs, v.Hex})
			one.same = one.same && v.Hex == one.of[0].hex
		}
	}
	return list
}

func noteOf(note string) string {
	if note == "" {
		return ""
	}
	return " (" + note + ")"
}

// sized are the values that depend on the VM's size or CPU. One that is the only one is shown with what it is for.
var sized = []string{"snp.launch_digest", "tdx.rtmr0"}

// firmwareOf is where the configuration names the firmware of its platform.
func firmwareOf(c *configs.Config) *string {
	if tee.Name(c.TEE.Platform) == tee.TDX {
		return &c.TEE.TDX.Firmware
	}
	return &c.TEE.SNP.Firmware
}
