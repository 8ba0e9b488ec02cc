// SPDX-License-Identifier: Apache-2.0

package stages

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestProgress(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(p *Progress)
		want string
	}{
		{"a stage with a result", func(p *Progress) {
			r := p.Begin("build", "about 1 min the first time", false)
			time.Sleep(1500 * time.Millisecond)
			r.End("fine")
		}, "==> build (about 1 min the first time)\n    1.50 s  fine\n"},
		{"in the background", func(p *Progress) {
			b := p.Begin("fetch", "", true)
			r := p.Begin("build", "", false)
			time.Sleep(time.Second)
			b.End("")
			r.End("")
		}, "==> fetch, in the background\n==> build\n    fetch: done after 1.00 s\n    1.00 s\n"},
		{"failed, with output", func(p *Progress) {
			p.Begin("fetch", "", true).Fail("one\ntwo\n")
		}, "==> fetch, in the background\n\n==> fetch: all of its output:\none\ntwo\n    fetch: failed after 0.00 s\n"},
		{"stopped", func(p *Progress) { p.Begin("fetch", "", false).Stop() }, "==> fetch\n    fetch: stopped after 0.00 s\n"},
		{"whole lines", func(p *Progress) {
			r := p.Begin("build", "", false)
			one, other := r.Output(), r.Output()
			for _, s := range []string{"a\nb", "c\n", "d"} {
				n, err := one.Write([]byte(s))
				require.NoError(t, err)
				require.Equal(t, len(s), n)
				_, err = other.Write([]byte("x"))
				require.NoError(t, err)
			}
			require.NoError(t, one.Close())
			require.NoError(t, other.Close())
		}, "==> build\n    | a\n    | bc\n    | d\n    | xxx\n"},
		{"signs of life", func(p *Progress) {
			b := p.Begin("fetch", "", true)
			time.Sleep(20 * time.Second)
			r := p.Begin("build", "1 min", false)
			time.Sleep(11 * time.Second)
			b.End("")
			time.Sleep(28*time.Second + 900*time.Millisecond)
			r.End("")
			p.Begin("next", "", false)
			time.Sleep(2 * time.Second)
		}, "==> fetch, in the background\n    ... fetch: 15 s\n==> build (1 min)\n    ... build: 10 s (1 min), fetch: 30 s\n" +
			"    fetch: done after 31.00 s\n    ... build: 25 s (1 min)\n    39.90 s\n==> next\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var b bytes.Buffer
				p := New(&b, Record{})
				ctx, cancel := context.WithCancel(t.Context())
				go p.Watch(ctx)
				c.do(p)
				cancel()
				synctest.Wait()
				assert.Equal(t, c.want, b.String())
			})
		})
	}
}

func TestTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := New(&b, Record{})
		p.terminal = true
		ctx, cancel := context.WithCancel(t.Context())
		go p.Watch(ctx)
		r := p.Begin("build", "", false)
		time.Sleep(2500 * time.Millisecond)
		r.End("")
		cancel()
		synctest.Wait()
		assert.Equal(t, "==> build\n    ... build: 1 s\r\x1b[K    ... build: 2 s\r\x1b[K    2.50 s\n", b.String())
	})
}

func TestRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(&bytes.Buffer{}, Record{Stages: []Stage{{Name: "first", Took: time.Second}}, Wall: time.Second})
		b := p.Begin("second", "", true)
		time.Sleep(2 * time.Second)
		b.End("not shown")
		path := filepath.Join(t.TempDir(), "record")
		require.NoError(t, p.Record().Write(path))
		read, err := Read(path)
		require.NoError(t, err)
		assert.Equal(t, p.Record(), read)

		var out bytes.Buffer
		require.NoError(t, New(&out, read).Record().Table(&out))
		assert.Equal(t, "STAGE   TIME    RESULT\nfirst   1.00 s  \nsecond  2.00 s  in the background\nall     3.00 s  \n", out.String())
	})
	_, err := Read(filepath.Join(t.TempDir(), "nothing"))
	require.Error(t, err)
}
