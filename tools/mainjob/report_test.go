// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cloister-project/cloister/tools/stages"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestTimeline(t *testing.T) {
	assert.Empty(t, timeline(""))
	assert.Equal(t, []row{
		{"network", "12 ms"},
		{"  in the guest: mounts", "800 ms after its kernel's start"},
	}, timeline("network=12 nonsense guest:mounts=800"))
}

func TestClean(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"a\x00b\x00", "a b"},
		{"\x1b[31mred\n", "[31mred"},
		{"6.12\n", "6.12"},
	} {
		assert.Equal(t, c.want, clean(c.in))
	}
	assert.Len(t, []rune(clean(string(bytes.Repeat([]byte("x"), 500)))), 60)
}

func TestStage(t *testing.T) {
	var b bytes.Buffer
	r := &report{out: &b, progress: stages.New(&b, stages.Record{Stages: []stages.Stage{{Name: "before", Took: 1500 * time.Millisecond}}})}
	require.NoError(t, r.stage(t.Context(), "good", func(context.Context) (string, error) { return "fine", nil }))
	fault := errors.New("no luck")
	require.ErrorIs(t, r.stage(t.Context(), "bad", func(context.Context) (string, error) { return "", fault }), fault)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, r.stage(cancelled, "never", nil), context.Canceled)
	r.proof = []comparison{{"boot id", "aaa", "bbb"}}
	b.Reset()
	require.NoError(t, r.print())
	assert.Regexp(t, `(?m)^before  1\.50 s  $`, b.String())
	assert.Regexp(t, `(?m)^good    \d\.\d\d s  fine$`, b.String())
	assert.NotContains(t, b.String(), "bad")
	assert.Contains(t, b.String(), "boot id  aaa               bbb\n")
}

func TestVerdict(t *testing.T) {
	same := func(what, both string) comparison { return comparison{what, both, both} }
	for _, c := range []struct {
		name  string
		proof []comparison
		fault string
	}{
		{"a VM", []comparison{{"kernel release", "6.12", "6.1"}, {"boot id", "a", "b"}, {"PID 1", "sh", "init"}}, ""},
		{"a VM on a host with the guest's kernel", []comparison{same("kernel release", "6.12"), {"boot id", "a", "b"}, {"PID 1", "sh", "init"}},
			""},
		{"no VM", []comparison{same("kernel release", "6.1"), same("boot id", "a"), {"PID 1", "sh", "init"}},
			`the kernel in the container is "6.1"`},
		{"no VM on a host with the guest's kernel", []comparison{same("kernel release", "6.12"), same("boot id", "a"), {"PID 1", "sh", "init"}},
			"boot id is"},
		{"nothing came back", []comparison{{"kernel release", "6.12", "6.1"}, {"boot id", "", "b"}, {"PID 1", "sh", "init"}}, "boot id is"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := verdict(c.proof, "6.12")
			if c.fault == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, c.fault)
			}
		})
	}
}
