// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/tee/snp/snpreport"
	"github.com/cloister-project/cloister/tee/tdx"
)

// MaxSize bounds evidence in bytes: what Linux hands out at most (configfs-tsm's outblob).
const MaxSize = 32 << 10

// Evidence is what a report or a quote says.
type Evidence struct {
	Platform tee.Name `json:"platform"`
	// Verified is always false: whoever showed the evidence may have written it.
	Verified bool `json:"verified"`
	// Values in the order in which a person looks for them; those that can be predicted have the names of reference values.
	Values []tee.Value `json:"values"`

	differences func(want *tee.ReferenceValues) error
}

// Read reads an attestation report of SEV-SNP or a quote of TDX, told apart by their form. errdefs.ErrInvalidArgument: it is
// neither; the error says why not for both.
func Read(raw []byte) (*Evidence, error) {
	report, err := snpreport.Parse(raw)
	if err == nil {
		return ofReport(report), nil
	}
	quote, tdxErr := tdx.ParseQuote(raw)
	if tdxErr == nil {
		return ofQuote(quote), nil
	}
	return nil, fmt.Errorf("neither an SEV-SNP attestation report nor a TDX quote: %w", errors.Join(err, tdxErr))
}

// needed are the values without which a comparison would not say what was launched: with which kernel, initrd, command line
// and initdata, and whether the host may look in. TDX's RTMR0 (ACPI tables, boot variables) is not among them.
var needed = map[tee.Name][]string{
	tee.SNP: {"snp.launch_digest", "snp.host_data", "snp.policy"},
	tee.TDX: {"tdx.mrtd", "tdx.rtmr1", "tdx.rtmr2", "tdx.mrconfigid", "tdx.attributes"},
}

const (
	rtmr0    = "tdx.rtmr0"
	leftOpen = "the reference values leave it open"
)

// Compare reports where the evidence differs from reference values, all differences in one errdefs.ErrFailedPrecondition;
// nil if it does not. That it does not differ proves nothing about who made it. Reference values that leave open what was
// launched are refused: errdefs.ErrInvalidArgument. What else they leave open is notCompared.
func (e *Evidence) Compare(want *tee.ReferenceValues) (notCompared []tee.Unpredicted, err error) {
	if want == nil || want.Platform != e.Platform || len(want.Values) == 0 {
		return nil, fmt.Errorf("these reference values are not of platform %q: %w", e.Platform, errdefs.ErrInvalidArgument)
	}
	reasons := map[string]string{}
	for _, u := range want.Unpredicted {
		reasons[u.Name] = u.Reason
	}
	var faults []error
	for _, name := range needed[e.Platform] {
		if !has(want, name) {
			faults = append(faults, fmt.Errorf("%s is missing: %s", name, cmp.Or(reasons[name], leftOpen)))
		}
	}
	if faults != nil {
		return nil, fmt.Errorf("these reference values do not say what was launched: %w: %w", errors.Join(faults...),
			errdefs.ErrInvalidArgument)
	}
	if err := e.differences(want); err != nil {
		return nil, err
	}
	if e.Platform == tee.TDX && !has(want, rtmr0) {
		notCompared = append(notCompared, tee.Unpredicted{Name: rtmr0, Reason: cmp.Or(reasons[rtmr0], leftOpen)})
	}
	return notCompared, nil
}

func has(values *tee.ReferenceValues, name string) bool {
	return slices.ContainsFunc(values.Values, func(v tee.Value) bool { return v.Name == name && v.Hex != "" })
}

// number is a number's bytes as the evidence has them.
func number(n uint64) string { return hex.EncodeToString(binary.LittleEndian.AppendUint64(nil, n)) }

func ofReport(r *snpreport.Report) *Evidence {
	e := &Evidence{Platform: tee.SNP}
	add := func(name, value, note string) {
		e.Values = append(e.Values, tee.Value{Name: name, Hex: value, Note: note})
	}
	add("snp.launch_digest", hex.EncodeToString(r.Measurement[:]), "MEASUREMENT")
	add("snp.host_data", hex.EncodeToString(r.HostData[:]), "the initdata's digest")
	add("snp.policy", number(r.Policy), snp.Policy(r.Policy).String())
	add("snp.id_key_digest", hex.EncodeToString(r.IDKeyDigest[:]), "")
	add("snp.author_key_digest", hex.EncodeToString(r.AuthorKeyDigest[:]), "")
	add("snp.report_data", hex.EncodeToString(r.ReportData[:]), "what the guest put in")
	add("snp.reported_tcb", number(r.ReportedTCB), "")
	add("snp.chip_id", hex.EncodeToString(r.ChipID[:]), "")
	e.differences = func(want *tee.ReferenceValues) error {
		got := make(map[string]string)
		for _, v := range e.Values {
			got[v.Name] = v.Hex
		}
		var faults []error
		for _, v := range want.Values {
			if value, there := got[v.Name]; !there || value != v.Hex {
				faults = append(faults, fmt.Errorf("%s is %s, predicted was %s", v.Name, value, v.Hex))
			}
		}
		if faults == nil {
			return nil
		}
		return fmt.Errorf("the report is not of this launch: %w (%w)", errors.Join(faults...), errdefs.ErrFailedPrecondition)
	}
	return e
}

func ofQuote(q *tdx.Quote) *Evidence {
	e := &Evidence{Platform: tee.TDX, differences: q.Compare}
	add := func(name, value, note string) {
		e.Values = append(e.Values, tee.Value{Name: name, Hex: value, Note: note})
	}
	add("tdx.mrtd", q.MRTD.String(), "")
	for i, r := range q.RTMR {
		add(fmt.Sprintf("tdx.rtmr%d", i), r.String(), "")
	}
	add("tdx.mrconfigid", q.MRConfigID.String(), "the initdata's digest")
	add("tdx.mrowner", q.MROwner.String(), "")
	add("tdx.mrownerconfig", q.MROwnerConfig.String(), "")
	add("tdx.attributes", number(q.Attributes), fmt.Sprintf("%#x", q.Attributes))
	add("tdx.xfam", number(q.XFAM), fmt.Sprintf("%#x", q.XFAM))
	add("tdx.mrseam", q.MRSEAM.String(), "")
	add("tdx.report_data", hex.EncodeToString(q.ReportData[:]), "what the guest put in")
	return e
}
