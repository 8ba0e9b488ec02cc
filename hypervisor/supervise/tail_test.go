// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestCleaner(t *testing.T) {
	for in, want := range map[string]string{
		"plain\r\n\ttext":             "plain\n\ttext",
		"\x1b[1;31mred\x1b[0m \x1bcX": "red X",
		"bell\x07 back\x08 del\x7f":   "bell back del",
		"ü \u202e \u0085 \xff":        "ü   ?",
		"\x1b[12\nnext":               "\nnext",
		"\x1b":                        "",
	} {
		require.Equal(t, want, string((&cleaner{}).filter([]byte(in))), "%q", in)
		// In pieces it comes out the same.
		var c cleaner
		var got []byte
		for i := range len(in) {
			got = append(got, c.filter([]byte{in[i]})...)
		}
		require.Equal(t, want, string(got), "%q in pieces", in)
	}
}

func FuzzCleaner(f *testing.F) {
	f.Add([]byte("\x1b[1mx\x1b[0m"), 3)
	f.Add([]byte("\xe2\x80\xaeü\xff"), 1)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		var c cleaner
		cut = min(max(cut, 0), len(b))
		out := append(c.filter(b[:cut]), c.filter(b[cut:])...)
		if !utf8.Valid(out) {
			t.Fatalf("%q is not valid", out)
		}
		for _, r := range string(out) {
			if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
				t.Fatalf("%q has %q", out, r)
			}
		}
		if len(c.partial) >= utf8.UTFMax {
			t.Fatalf("keeps %d bytes", len(c.partial))
		}
	})
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := NewTail(path)
	require.NoError(t, err)
	_, err = NewTail(path)
	require.ErrorIs(t, err, os.ErrExist)
	require.Empty(t, l.Quote())
	l.write([]byte("hello\n"))
	require.Equal(t, "hello", l.Quote())

	line := strings.Repeat("x", 98) + "\n"
	for range 20000 {
		l.write([]byte(line))
	}
	l.write([]byte(strings.Repeat("y", 3*tailSize) + "\nend"))
	text, _ := l.Text()
	require.Len(t, text, tailSize)
	require.True(t, strings.HasSuffix(text, "y\nend"))
	require.Equal(t, "end", l.Quote(), "from a whole line on")
	for range 100 {
		l.write([]byte("\nshort"))
	}
	require.Equal(t, quotedLines, strings.Count(l.Quote(), "short"))
	for _, p := range []string{path, path + ".1"} {
		fi, err := os.Stat(p)
		require.NoError(t, err)
		require.LessOrEqual(t, fi.Size(), int64(MaxLogFile/2))
	}
	require.NoError(t, l.Remove())
	require.NoFileExists(t, path)
	require.NoFileExists(t, path+".1")
	l.write([]byte("after the end"))
}

func TestPanicLine(t *testing.T) {
	console := "INIT\n[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009\n[    1.1] CPU: 0\n" +
		"[    1.2] ---[ end Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009 ]---\nRebooting\n"
	require.Equal(t, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009", PanicLine(console))
	require.Empty(t, PanicLine("all is well"))
	require.LessOrEqual(t, len(PanicLine("Kernel panic - not syncing"+strings.Repeat("!", 1000))), maxLine)
}

func TestQuoteAroundAPanic(t *testing.T) {
	lines := func(prefix string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "%s%d\n", prefix, i)
		}
		return b.String()
	}
	const panicked = PanicMark + ": Attempted to kill init!\n"
	for _, c := range []struct {
		name, console string
		want, not     []string
	}{
		{"no panic", lines("boot", 100), []string{"boot99"}, []string{"boot0\n", "[...]"}},
		{"short trace", lines("boot", 50) + "the cause\n" + panicked + lines("trace", 5), []string{"the cause", panicked, "trace4"},
			[]string{"[...]"}},
		{"long trace", lines("boot", 50) + "the cause\n" + panicked + lines("trace", 100),
			[]string{"the cause\n" + panicked + "[...]\n", "trace99"}, []string{"boot0\n", "trace0\n"}},
		{"panic first", panicked + lines("trace", 100), []string{panicked + "[...]\n", "trace99"}, []string{"trace0\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			console, err := NewTail(filepath.Join(t.TempDir(), "log"))
			require.NoError(t, err)
			defer console.Close()
			console.write([]byte(c.console))
			got := console.QuoteAround(PanicMark)
			for _, w := range c.want {
				assert.Contains(t, got+"\n", w)
			}
			for _, w := range c.not {
				assert.NotContains(t, got+"\n", w)
			}
			assert.LessOrEqual(t, len(strings.Split(got, "\n")), quotedLines)
		})
	}
}
