// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/report"
)

const document = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\nx = \"y\"\n"

func digest(t *testing.T, text string, size int) []byte {
	t.Helper()
	d, err := initdata.Parse([]byte(text))
	require.NoError(t, err)
	return initdata.Bind(d.Digest(), size)
}

func TestParse(t *testing.T) {
	hexed := hex.EncodeToString(digest(t, document, 64))
	for name, tc := range map[string]struct {
		cmdline  string
		platform abi.Platform
		bound    bool
	}{
		"ordinary":         {"console=ttyS0 quiet panic=-1\n", "", false},
		"ordinary, debug":  {"cloister.debug", "", false},
		"snp":              {"quiet cloister.tee=snp panic=-1", "snp", false},
		"se with initdata": {"cloister.tee=se cloister.initdata=" + hexed, "se", true},
		"sample":           {"cloister.initdata=" + hexed + " cloister.tee=sample", "sample", true},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Parse(tc.cmdline)
			require.NoError(t, err)
			require.Equal(t, tc.platform, l.Platform)
			require.Equal(t, tc.platform != "", l.Confidential())
			require.Equal(t, tc.bound, l.bound != nil)
		})
	}
	for name, tc := range map[string]struct{ cmdline, says string }{
		"unknown platform":        {"cloister.tee=sev", `"sev"`},
		"empty platform":          {"cloister.tee=", "known are"},
		"no value":                {"cloister.tee", "known are"},
		"two platforms":           {"cloister.tee=sample cloister.tee=snp", "twice"},
		"debug in a TEE":          {"cloister.debug cloister.tee=tdx", "cloister.debug"},
		"debug behind":            {"cloister.tee=sample cloister.debug", "cloister.debug"},
		"debug with a value":      {"cloister.tee=sample cloister.debug=1", "cloister.debug"},
		"initdata by hand on snp": {"cloister.tee=snp cloister.initdata=" + hexed, "hardware binds"},
		"initdata without TEE":    {"cloister.initdata=" + hexed, "not for platform"},
		"short binding":           {"cloister.tee=se cloister.initdata=" + hexed[2:], "64 bytes"},
		"no hex":                  {"cloister.tee=se cloister.initdata=" + strings.Repeat("x", 128), "64 bytes"},
		"quoted":                  {"\"cloister.tee=snp\"", "cloister.tee"},
		"quoted value":            {"cloister.tee=\"snp\"", "known are"},
		"another spelling":        {"cloister.tees=snp", "cloister.tee"},
		"a binding of zeros":      {"cloister.tee=se cloister.initdata=" + strings.Repeat("0", 128), "zero"},
		"two bindings":            {"cloister.tee=se cloister.initdata=" + hexed + " cloister.initdata=" + hexed, "twice"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(tc.cmdline)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

// guest is a machine made up for a test.
type guest struct {
	platform abi.Platform
	bound    []byte
	disk     []byte // nil: there is none
}

func (g guest) looks() Guest {
	return Guest{
		ReadHardware: func(platform abi.Platform) (*report.Launch, error) {
			if platform != g.platform {
				return nil, errors.New("other hardware")
			}
			return &report.Launch{Platform: platform, Bound: g.bound}, nil
		},
		OpenDisk: func(ctx context.Context, serial string) (io.ReadCloser, error) {
			if serial != "initdata" || g.disk == nil {
				return nil, errors.New("no such disk")
			}
			return io.NopCloser(bytes.NewReader(g.disk)), nil
		},
		HasDisk: func(serial string) (bool, error) { return serial == "initdata" && g.disk != nil, nil },
	}
}

func disk(t *testing.T, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, initdata.WriteDisk(&b, []byte(text)))
	return b.Bytes()
}

func TestCheck(t *testing.T) {
	other := strings.Replace(document, "y", "z", 1)
	param := "cloister.initdata=" + hex.EncodeToString(digest(t, document, 64))
	for name, tc := range map[string]struct {
		cmdline string
		guest   guest
		// says is part of the error; empty: there is none.
		says  string
		found bool
	}{
		"ordinary VM looks at nothing": {cmdline: "quiet"},
		"ordinary VM with a disk":      {cmdline: "quiet", guest: guest{disk: disk(t, document)}},
		"snp without initdata":         {cmdline: "cloister.tee=snp", guest: guest{platform: abi.SNP, bound: make([]byte, 32)}},
		"snp with initdata": {cmdline: "cloister.tee=snp", guest: guest{abi.SNP, digest(t, document, 32), disk(t, document)},
			found: true},
		"tdx with initdata": {cmdline: "cloister.tee=tdx", guest: guest{abi.TDX, digest(t, document, 48), disk(t, document)},
			found: true},
		"se with initdata":     {cmdline: "cloister.tee=se " + param, guest: guest{abi.SE, nil, disk(t, document)}, found: true},
		"se without":           {cmdline: "cloister.tee=se", guest: guest{platform: abi.SE}},
		"sample with initdata": {cmdline: "cloister.tee=sample " + param, guest: guest{disk: disk(t, document)}, found: true},
		"sample without":       {cmdline: "cloister.tee=sample"},
		"no such hardware":     {cmdline: "cloister.tee=snp", guest: guest{platform: abi.TDX}, says: "made for platform snp"},
		"no report":            {cmdline: "cloister.tee=snp", guest: guest{platform: abi.SNP}, says: "binds nothing"},
		"bound, and the disk is missing": {cmdline: "cloister.tee=snp", guest: guest{platform: abi.SNP, bound: digest(t, document, 32)},
			says: "disk is missing"},
		"bound to another": {cmdline: "cloister.tee=snp", guest: guest{abi.SNP, digest(t, document, 32), disk(t, other)},
			says: "another document"},
		"se: bound to another": {cmdline: "cloister.tee=se " + param, guest: guest{abi.SE, nil, disk(t, other)},
			says: "another document"},
		"a disk that nobody bound": {cmdline: "cloister.tee=snp", guest: guest{abi.SNP, make([]byte, 32), disk(t, document)},
			says: "not bound to any"},
		"se: a disk that nobody sealed": {cmdline: "cloister.tee=se", guest: guest{abi.SE, nil, disk(t, document)},
			says: "not bound to any"},
		"sample: a disk that nobody bound": {cmdline: "cloister.tee=sample", guest: guest{disk: disk(t, document)}, says: "not bound to any"},
		"a disk with garbage": {cmdline: "cloister.tee=sample " + param, guest: guest{disk: []byte("garbage, 16 bytes or more")},
			says: "initdata disk"},
		"a disk with another kind of text": {cmdline: "cloister.tee=sample " + param, guest: guest{disk: disk(t, "x = ''\n")},
			says: "initdata has"},
		"snp: the report's field is at odds": {cmdline: "cloister.tee=snp", guest: guest{abi.SNP, append(make([]byte, 31), 1), disk(t, document)},
			says: "another document"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Parse(tc.cmdline)
			require.NoError(t, err)
			doc, err := l.Check(t.Context(), tc.guest.looks())
			if tc.says != "" {
				require.ErrorContains(t, err, tc.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.found, doc != nil)
			if doc != nil {
				require.Equal(t, "y", doc.Data["x"])
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("console=ttyS0 cloister.tee=snp")
	f.Add("cloister.tee=se cloister.initdata=" + strings.Repeat("0", 128))
	f.Fuzz(func(t *testing.T, cmdline string) {
		l, err := Parse(cmdline)
		if err == nil && l.bound != nil {
			require.Len(t, l.bound, abi.BindingSize)
			require.True(t, l.Confidential())
		}
	})
}
