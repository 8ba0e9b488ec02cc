// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

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
		// In pieces it gives the same.
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
	l, err := newTail(path)
	require.NoError(t, err)
	_, err = newTail(path)
	require.ErrorIs(t, err, os.ErrExist)
	require.Empty(t, l.quote())
	l.write([]byte("hello\n"))
	require.Equal(t, "hello", l.quote())

	line := strings.Repeat("x", 98) + "\n"
	for range 20000 {
		l.write([]byte(line))
	}
	l.write([]byte(strings.Repeat("y", 3*tailSize) + "\nend"))
	text, _ := l.text()
	require.Len(t, text, tailSize)
	require.True(t, strings.HasSuffix(text, "y\nend"))
	require.Equal(t, "end", l.quote(), "from a whole line on")
	for range 100 {
		l.write([]byte("\nshort"))
	}
	require.Equal(t, quotedLines, strings.Count(l.quote(), "short"))
	for _, p := range []string{path, path + ".1"} {
		fi, err := os.Stat(p)
		require.NoError(t, err)
		require.LessOrEqual(t, fi.Size(), int64(maxLogFile/2))
	}
	require.NoError(t, l.remove())
	require.NoFileExists(t, path)
	require.NoFileExists(t, path+".1")
	l.write([]byte("after the end"))
}

func TestPanicLine(t *testing.T) {
	console := "INIT\n[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009\n[    1.1] CPU: 0\n" +
		"[    1.2] ---[ end Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009 ]---\nRebooting\n"
	require.Equal(t, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009", panicLine(console))
	require.Empty(t, panicLine("all is well"))
	require.LessOrEqual(t, len(panicLine("Kernel panic - not syncing"+strings.Repeat("!", 1000))), maxPanicLine)
}
