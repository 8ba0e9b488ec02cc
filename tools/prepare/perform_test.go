// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-project/cloister/tools/stages"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func sh(name, script string, background bool, after ...string) step {
	return step{name: name, command: []string{"sh", "-c", script}, background: background, after: after}
}

func TestPerform(t *testing.T) {
	for _, c := range []struct {
		name     string
		steps    []step
		fault    string
		contains []string
		lacks    []string
	}{
		{"in order", []step{
			sh("one", "until [ -e two ]; do sleep 0.01; done; echo silent; touch one", true),
			sh("two", "touch two; echo shown", false),
			sh("three", "[ -e one ] && echo third", false, "one"),
		}, "", []string{"    | shown\n", "    | third\n", "one: done after"}, []string{"silent"}},
		{"a background step fails", []step{
			sh("bad", "echo reason >&2; exit 3", true),
			sh("never", "touch never", true, "bad"),
			sh("long", "sleep 1000", false),
		}, "bad: sh -c", []string{"==> bad: all of its output:\nreason\n", "bad: failed after", "long: stopped after"}, []string{"==> never"}},
		{"a step fails", []step{
			sh("long", "sleep 1000 & sleep 1000", true),
			sh("bad", "echo reason >&2; exit 3", false),
			sh("never", "touch never", false),
		}, "bad: sh -c", []string{"    | reason\n", "bad: failed after", "long: stopped after"}, []string{"==> never"}},
		{"one that is not waited for fails", []step{
			sh("bad", "until [ -e fine ]; do sleep 0.01; done; exit 3", true),
			sh("fine", "touch fine", false),
		}, "bad: sh -c", nil, nil},
		{"no such program", []step{{name: "bad", command: []string{"./no-such-program"}}}, "no such file", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			var out bytes.Buffer
			err := perform(t.Context(), stages.New(&out, stages.Record{}), c.steps)
			if c.fault == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, c.fault)
			}
			for _, want := range c.contains {
				assert.Contains(t, out.String(), want)
			}
			for _, not := range c.lacks {
				assert.NotContains(t, out.String(), not)
			}
		})
	}
}

// TestPerformCancelled ends steps whose programs have children of their own, one of which is deaf to SIGTERM's default.
func TestPerformCancelled(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	const slow = "trap 'sleep 0.3; exit 1' TERM; echo $$ > slow.new; mv slow.new slow; while :; do sleep 0.05; done"
	steps := []step{
		sh("leader leaves first", "sh -c \""+strings.NewReplacer("$", "\\$").Replace(slow)+"\" > /dev/null 2>&1 & sleep 1000", true),
		sh("front", "sleep 1000", false),
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("interrupted")
	var pid int
	var waiting sync.WaitGroup
	waiting.Go(func() {
		for pid == 0 && t.Context().Err() == nil {
			data, _ := os.ReadFile(filepath.Join(dir, "slow"))
			pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
			time.Sleep(pollInterval)
		}
		cancel(reason)
	})
	err := perform(ctx, stages.New(&bytes.Buffer{}, stages.Record{}), steps)
	waiting.Wait()
	require.ErrorIs(t, err, reason)
	require.NotZero(t, pid)
	require.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
}
