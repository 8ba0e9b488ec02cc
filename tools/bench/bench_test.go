// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
)

func TestStatistics(t *testing.T) {
	for _, tc := range []struct {
		samples               []float64
		median, slope, growth float64
	}{
		{nil, 0, 0, 1},
		{[]float64{7}, 7, 0, 1},
		{[]float64{1, 3}, 2, 2, 3},
		{[]float64{5, 5, 5, 5}, 5, 0, 1},
		{[]float64{30, 10, 20}, 20, -5, 20.0 / 30},
		{[]float64{1, 2, 3, 4}, 2.5, 1, 3.5 / 1.5},
	} {
		before := append([]float64(nil), tc.samples...)
		assert.InDelta(t, tc.median, median(tc.samples), 1e-9, "%v", tc.samples)
		assert.InDelta(t, tc.slope, slope(tc.samples), 1e-9, "%v", tc.samples)
		assert.InDelta(t, tc.growth, growth(tc.samples), 1e-9, "%v", tc.samples)
		assert.Equal(t, before, append([]float64(nil), tc.samples...), "the samples stay in their order")
	}
	assert.InDelta(t, 4.0, mibPerSecond(8<<20, 2*time.Second), 1e-9)
	assert.InDelta(t, 1.5, milliseconds(1500*time.Microsecond), 1e-9)
}

func TestVerdicts(t *testing.T) {
	ours := func(v float64) *samples { return &samples{Unit: "ms", Values: []float64{v}} }
	for want, r := range map[string]row{
		"met":                      ratioRow("a", ours(11), ours(10)).budgeted(atMost(1.15), atMost(1.35)),
		"first target met":         ratioRow("b", ours(12), ours(10)).budgeted(atMost(1.15), atMost(1.35)),
		"not met":                  ratioRow("c", ours(14), ours(10)).budgeted(atMost(1.15), atMost(1.35)),
		"reported":                 ratioRow("d", ours(14), ours(10)),
		"not measured: no samples": ratioRow("e", ours(14), &samples{}).budgeted(atMost(1), nil),
	} {
		assert.Equal(t, want, r.verdict())
	}
	assert.Equal(t, "met", row{Value: 0.9}.budgeted(atLeast(0.9), nil).verdict())
	assert.Equal(t, "not met", row{Value: 0.89}.budgeted(atLeast(0.9), nil).verdict())
}

func TestReport(t *testing.T) {
	r := report{Rows: []row{
		ratioRow("fast", &samples{Name: "x", Unit: "ms", Values: []float64{3, 1, 2}}, &samples{Name: "runc", Unit: "ms", Values: []float64{4}}).
			budgeted(atMost(0.25), nil).noted("how it was %s", "done"),
		row{What: "size", Value: 20.25, Unit: " MiB"}.budgeted(atMost(16), atMost(32)),
		{What: "gone", Missing: "no such thing"},
	}, Failures: []string{"step: reason"}}
	assert.Equal(t, []string{"fast"}, r.missed())
	md := r.markdown()
	for _, want := range []string{
		"| fast | 0.50 | 2.0 ms | 4.0 ms (runc) | ≤ 0.25 | – | not met |",
		"| size | 20.2 MiB | – | – | ≤ 16 MiB | ≤ 32 MiB | first target met |",
		"| gone | – | – | – | – | – | not measured: no such thing |",
		"- **fast**: how it was done", "- **failed**: step: reason",
	} {
		assert.Contains(t, md, want)
	}
	assert.Contains(t, r.text(), "not measured: no such thing")

	dir := t.TempDir()
	require.NoError(t, r.write(dir))
	data, err := os.ReadFile(filepath.Join(dir, "bench.json"))
	require.NoError(t, err)
	var read report
	require.NoError(t, json.Unmarshal(data, &read))
	assert.Equal(t, r, read)
	require.FileExists(t, filepath.Join(dir, "bench.md"))
}

// The empty init is an ELF file as the kernel takes it, in an archive as the kernel takes it.
func TestEmptyInit(t *testing.T) {
	f, err := elf.NewFile(bytes.NewReader(emptyInit()))
	require.NoError(t, err)
	require.Len(t, f.Progs, 1)
	require.Equal(t, elf.PF_R|elf.PF_X, f.Progs[0].Flags)
	require.EqualValues(t, len(emptyInit()), f.Progs[0].Filesz)

	initrd, err := emptyInitrd()
	require.NoError(t, err)
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(initrd)))
	require.NoError(t, err)
	var names []string
	for _, r := range records {
		names = append(names, r.Name)
	}
	require.Equal(t, []string{"dev", "dev/console", "init"}, names)

	replaced, err := probeInitrd(bytes.NewReader(initrd), []byte("another"))
	require.NoError(t, err)
	require.Contains(t, string(replaced), "another")
	_, err = probeInitrd(strings.NewReader("not an archive"), nil)
	require.Error(t, err)
}

func TestBareQEMUThatFails(t *testing.T) {
	_, err := bareQEMU{path: "/bin/false"}.boot(context.Background(), "")
	require.ErrorContains(t, err, "without a word of its init")
	_, err = bareQEMU{path: "/no/such/qemu"}.boot(context.Background(), "")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestTimedRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(path, make([]byte, 3<<20), 0o600))
	took, err := timeRead(path, 1<<20, 2<<20)
	require.NoError(t, err)
	require.Positive(t, took)
	_, err = timeRead(path, 2<<20, 2<<20)
	require.ErrorContains(t, err, "were asked for")
	require.Error(t, timeReadMain(path, "many"))
	require.NoError(t, timeReadMain(path, strconv.Itoa(3<<20)))
}

func TestStreams(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, send(&b, 200<<10))
	require.Equal(t, 200<<10, b.Len())
	rate, err := receive(&b, 200<<10)
	require.NoError(t, err)
	require.Positive(t, rate)
	_, err = receive(strings.NewReader("abc"), 4)
	require.ErrorContains(t, err, "3 bytes of 4")
	_, err = receive(strings.NewReader(""), 4)
	require.Error(t, err)

	n, err := readNumber(bytes.NewReader(binary.LittleEndian.AppendUint64(nil, 42)))
	require.NoError(t, err)
	require.EqualValues(t, 42, n)
	_, err = readNumber(strings.NewReader("error: it broke"))
	require.ErrorContains(t, err, "it broke")
}

func TestKibLine(t *testing.T) {
	v, err := kibLine("Rss:  2048 kB\nPss:   512 kB\n", "Pss", "smaps")
	require.NoError(t, err)
	require.InDelta(t, 0.5, v, 1e-9)
	_, err = kibLine("Rss: 1 kB\n", "Pss", "smaps")
	require.ErrorContains(t, err, "smaps has no Pss")
}
