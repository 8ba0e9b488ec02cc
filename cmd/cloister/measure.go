// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// measurement is what measure prints as JSON.
type measurement struct {
	Platform    tee.Name `json:"platform"`
	Description string   `json:"description"`
	// Predicted is always true: the values are computed from files, no hardware reported them.
	Predicted       bool                  `json:"predicted"`
	ReferenceValues []tee.ReferenceValues `json:"reference_values"`
	// emulated: a QEMU was asked for what it gives to the firmware.
	emulated bool
}

// variants are what is measured for.
type variants struct {
	vcpus  []int
	models []string // "" is the configuration's
}

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
			var v variants
			var err error
			if v.vcpus, err = parseCounts(vcpus); err != nil {
				return err
			}
			if v.models, err = parseModels(models); err != nil {
				return err
			}
			if err := checkName(f.tee); err != nil {
				return err
			}
			p := defaultPod()
			if file != "" {
				if p, err = readPod(file, cmd.InOrStdin()); err != nil {
					return err
				}
			}
			f.tee, _ = platformOf(f.tee, p)
			cfg, err := f.load()
			if err != nil {
				return err
			}
			replaced := *cfg
			for _, r := range []struct {
				flag, path string
				to         *string
			}{{"firmware", firmware, firmwareOf(&replaced)}, {"kernel", kernel, &replaced.Hypervisor.Kernel}, {"initrd", initrd, &replaced.Hypervisor.Initrd}} {
				if r.path == "" {
					continue
				}
				if *r.to, err = filepath.Abs(r.path); err != nil {
					return usage("--%s: %w", r.flag, err)
				}
			}
			o, err := acpi.options(cmd, &replaced)
			if err != nil {
				return err
			}
			m, err := measure(cmd.Context(), &replaced, p, v, o)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return m.print(cmd.OutOrStdout())
		},
	}
	f.add(cmd, "measure for this platform: snp, tdx or se (default: the pod's or the configured one)")
	cmd.Flags().StringVar(&vcpus, "vcpus", "", "numbers of virtual CPUs, for example 1-8 or 1,2,4")
	cmd.Flags().StringVar(&models, "cpu-model", "", "CPU models, separated by commas (default: hypervisor.cpu_model, EPYC-v4 with snp)")
	cmd.Flags().StringVarP(&file, "file", "f", "", "manifest of a Pod, YAML or JSON; - is standard input (default: a pod without limits)")
	cmd.Flags().StringVar(&firmware, "firmware", "", "firmware image in place of the configured one; its digest must be among firmware_digests")
	cmd.Flags().StringVar(&kernel, "kernel", "", "kernel in place of hypervisor.kernel")
	cmd.Flags().StringVar(&initrd, "initrd", "", "initrd in place of hypervisor.initrd")
	acpi.add(cmd)
	return cmd
}

// maxVariants bounds what one call computes.
const maxVariants = 4096

// parseCounts takes "1-4,8". Nothing gives nothing.
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
		if err1 != nil || err2 != nil || low < 1 || high < low || high > maxVariants {
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
		return []string{""}, nil
	}
	models := strings.Split(text, ",")
	for _, m := range models {
		if m == "" || strings.ContainsAny(m, " =") {
			return nil, usage("--cpu-model %q: %q is no CPU model", text, m)
		}
	}
	return models, nil
}

// measure predicts the values for each variant: all CPU counts of the first model, then of the next.
func measure(ctx context.Context, cfg *configs.Config, p *pod, v variants, o platform.Options) (*measurement, error) {
	name := tee.Name(cfg.TEE.Platform)
	m := &measurement{Platform: name, Description: name.Describe(), Predicted: true, emulated: o.Tables != nil}
	if !name.Protected() {
		return nil, fmt.Errorf("platform %s: no hardware measures it, so there is nothing to predict; choose snp, tdx or se with --tee", name.Describe())
	}
	applied, err := cfg.ApplyAnnotations(p.Metadata.Annotations)
	if err != nil {
		return nil, err
	}
	counts := v.vcpus
	if counts == nil {
		counts = []int{0} // the pod's own
	}
	if n := len(counts) * len(v.models); n > maxVariants {
		return nil, usage("%d numbers of CPUs and %d models are %d variants; at most %d are computed at once", len(counts), len(v.models), n, maxVariants)
	}
	var all []*batch
	for _, model := range v.models {
		c := *applied
		if model != "" {
			c.Hypervisor.CPUModel = model
		}
		for _, run := range runs(counts, name == tee.SNP) {
			b := &batch{cfg: c, counts: run}
			b.pod = podConfig(&b.cfg, p)
			if n := run[0]; n > 0 {
				setCPUs(&b.pod, n)
				b.cfg.Sizing.MaxVCPUs = 0
			}
			all = append(all, b)
		}
	}
	// Each reads and hashes all files.
	turns := make(chan struct{}, runtime.GOMAXPROCS(0))
	var done sync.WaitGroup
	for _, b := range all {
		done.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			b.values, b.err = b.measure(ctx, o)
		})
	}
	done.Wait()
	for _, b := range all {
		if b.err != nil {
			return nil, b.err
		}
		for _, r := range b.values {
			m.ReferenceValues = append(m.ReferenceValues, *r)
		}
	}
	return m, nil
}

// batch is what is measured from one plan: one number of CPUs, or where the platform can, all of a range.
type batch struct {
	cfg    configs.Config
	pod    vc.PodConfig
	counts []int
	values []*tee.ReferenceValues
	err    error
}

// runs cuts numbers into ranges without a gap if ranges can be measured, else into single ones.
func runs(counts []int, ranges bool) (all [][]int) {
	for i, n := range counts {
		if last := len(all) - 1; ranges && i > 0 && counts[i-1] == n-1 {
			all[last] = append(all[last], n)
			continue
		}
		all = append(all, []int{n})
	}
	return all
}

// ranger measures one plan for each number of CPUs in a range, and reads the files once.
type ranger interface {
	MeasureRange(ctx context.Context, doc hypervisor.Document, first, last int) ([]*tee.ReferenceValues, error)
}

func (b *batch) measure(ctx context.Context, o platform.Options) ([]*tee.ReferenceValues, error) {
	doc, t, err := vc.PlanVM(ctx, b.pod)
	if err != nil {
		return nil, err
	}
	if o.ACPI != "" || o.Tables != nil {
		if t, err = platform.NewWith(b.pod.Config, o); err != nil {
			return nil, err
		}
	}
	if r, ok := t.(ranger); ok && len(b.counts) > 1 {
		return r.MeasureRange(ctx, *doc, b.counts[0], b.counts[len(b.counts)-1])
	}
	value, err := t.Measure(ctx, *doc)
	return []*tee.ReferenceValues{value}, err
}

// setCPUs makes the pod one that gets so many.
func setCPUs(c *vc.PodConfig, n int) {
	r := *c.Resources
	cpu := *wholeCPUs(n)
	r.CPU = &cpu
	c.Resources = &r
}

func (m *measurement) print(w io.Writer) error {
	out := printer{w: w}
	out.line("platform  %s", m.Description)
	if m.emulated {
		out.line("          Predicted from files and from what an emulated QEMU gives to the firmware; no hardware was asked.")
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
	for i, v := range first.Values {
		out.line("\n%s%s", v.Name, noteOf(v.Note))
		if m.same(i) {
			out.line("  %s", valueOf(v))
			continue
		}
		for _, r := range m.ReferenceValues {
			out.line("  %-14s %-9s %s", r.CPUModel, plural(r.VCPUs, "vCPU"), valueOf(r.Values[i]))
		}
	}
	return out.err
}

func noteOf(note string) string {
	if note == "" {
		return ""
	}
	return " (" + note + ")"
}

func valueOf(v tee.Value) string {
	if v.Hex == "" {
		return "-"
	}
	return v.Hex
}

// same tells whether a value does not depend on the variant. One that is the only one is shown with what it is for, if it
// is one that depends on it as a rule.
func (m *measurement) same(i int) bool {
	first := m.ReferenceValues[0].Values[i]
	if slices.Contains(sized, first.Name) {
		return false
	}
	return !slices.ContainsFunc(m.ReferenceValues, func(r tee.ReferenceValues) bool {
		return len(r.Values) <= i || r.Values[i].Hex != first.Hex
	})
}

// sized are the values that depend on the VM's size or CPU.
var sized = []string{"snp.launch_digest", "tdx.rtmr0"}

// firmwareOf is where the configuration names the firmware of its platform.
func firmwareOf(c *configs.Config) *string {
	if c.TEE.Platform == configs.PlatformTDX {
		return &c.TEE.TDX.Firmware
	}
	return &c.TEE.SNP.Firmware
}
