// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/evidence"
	"github.com/cloister-project/cloister/tee/firmware"
)

// maxReferenceValues bounds the file of --reference: what measure prints at most is smaller.
const maxReferenceValues = 64 << 20

func evidenceCommand() *cobra.Command {
	var (
		reference string
		asJSON    bool
	)
	cmd := &cobra.Command{
		Use:   "evidence FILE",
		Short: "Show what an SEV-SNP attestation report or a TDX quote says, and compare it with reference values",
		Long: "evidence shows the registers of an attestation report of SEV-SNP or of a quote of TDX, by the names that cloister\n" +
			"measure has. With --reference, what cloister measure --json printed, it says whether they are those of one of the VMs\n" +
			"that were measured, and which register was not compared; exit status 1 if not. Reference values that leave open which\n" +
			"kernel, initrd, command line or initdata was launched are refused.\n\n" +
			"NOTHING IS VERIFIED: neither the signature nor its certificates, nor whether the evidence is new. Whoever shows it may\n" +
			"have written it.",
		Example: "  cloister measure --tee snp --vcpus 1-8 --json > values.json\n" +
			"  cloister evidence report.bin --reference values.json",
		Args: oneArg("a report or a quote"),
		RunE: func(cmd *cobra.Command, args []string) error {
			raw, _, err := firmware.ReadFile(args[0], evidence.MaxSize)
			if err != nil {
				return err
			}
			e, err := evidence.Read(raw)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			shown := struct {
				*evidence.Evidence
				Match *match `json:"match,omitempty"`
			}{Evidence: e}
			var differs error
			if reference != "" {
				shown.Match, differs = compareEvidence(e, reference)
			}
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), shown), differs)
			}
			out := printer{w: cmd.OutOrStdout()}
			out.line("platform  %s\n          NOT VERIFIED: neither signature nor certificates were looked at.", e.Platform.Describe())
			for _, v := range e.Values {
				out.line("\n%s%s\n  %s", v.Name, noteOf(v.Note), v.Hex)
			}
			if m := shown.Match; m != nil {
				out.line("\nThe values are those of a VM with %s of %s.", plural(m.VCPUs, "vCPU"), m.CPUModel)
				for _, u := range m.NotCompared {
					out.line("NOT COMPARED: %s: %s", u.Name, u.Reason)
				}
			}
			return errors.Join(out.err, differs)
		},
	}
	cmd.Flags().StringVar(&reference, "reference", "", "file with reference values, as cloister measure --json prints them")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// match is the VM whose reference values the evidence has.
type match struct {
	VCPUs       int               `json:"vcpus"`
	CPUModel    string            `json:"cpu_model,omitempty"`
	NotCompared []tee.Unpredicted `json:"not_compared,omitempty"`
}

// compareEvidence returns which of the reference values the evidence has; none of them is an error.
func compareEvidence(e *evidence.Evidence, path string) (*match, error) {
	content, _, err := firmware.ReadFile(path, maxReferenceValues)
	if err != nil {
		return nil, fmt.Errorf("--reference: %w", err)
	}
	var m struct {
		ReferenceValues []tee.ReferenceValues `json:"reference_values"`
	}
	if err := json.Unmarshal(content, &m); err != nil {
		return nil, fmt.Errorf("--reference: %s is not what cloister measure --json prints: %w", path, err)
	}
	var differences []error
	for _, want := range m.ReferenceValues {
		notCompared, err := e.Compare(&want)
		if err == nil {
			return &match{want.VCPUs, want.CPUModel, notCompared}, nil
		}
		differences = append(differences, fmt.Errorf("for %s of %s: %w", plural(want.VCPUs, "vCPU"), want.CPUModel, err))
	}
	if differences == nil {
		return nil, fmt.Errorf("--reference: %s has no reference values", path)
	}
	return nil, errors.Join(differences...)
}
