// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/cloister-project/cloister/test/harness"
	"github.com/stretchr/testify/assert"
)

func TestPlan(t *testing.T) {
	for _, c := range []struct {
		name, handler string
		keep, built   bool
		want          []string
	}{
		{name: "the first time", want: []string{
			"& make setup-run", "& make modules", "& fetch containerd ctr bridge host-local loopback portmap",
			"make mainjob", "make build-host", "build containerd ctr bridge host-local loopback portmap", "make guest",
		}},
		{name: "again", built: true, want: []string{
			"& make setup-run", "& fetch containerd ctr bridge host-local loopback portmap",
			"make mainjob", "make build-host", "build containerd ctr bridge host-local loopback portmap", "make guest",
		}},
		{name: "left up", built: true, keep: true, want: []string{
			"& make setup-run", "& fetch containerd ctr bridge host-local loopback portmap", "& fetch crictl nerdctl",
			"make mainjob", "make build-host", "build containerd ctr bridge host-local loopback portmap", "make guest", "build crictl nerdctl",
		}},
		{name: "runc", handler: harness.HandlerRunc, built: true, want: []string{
			"& make setup-run", "& fetch containerd ctr bridge host-local loopback portmap containerd-shim-runc-v2 runc",
			"make mainjob", "build containerd ctr bridge host-local loopback portmap containerd-shim-runc-v2 runc",
		}},
		{name: "EROFS", handler: harness.HandlerErofs, built: true, want: []string{
			"& make setup", "& fetch containerd ctr bridge host-local loopback portmap",
			"make mainjob", "make build-host", "build containerd ctr bridge host-local loopback portmap", "make guest",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			steps := plan(c.handler, c.keep, c.built, true)
			var got []string
			background := map[string]bool{}
			for _, s := range steps {
				line := strings.Join(s.command, " ")
				for _, r := range []struct{ from, to string }{
					{"make --no-print-directory", "make"}, {"tools/conformance/build --fetch", "fetch"}, {"tools/conformance/build", "build"},
				} {
					line = strings.Replace(line, r.from, r.to, 1)
				}
				if s.background {
					line = "& " + line
				}
				got = append(got, line)
				for _, name := range s.after {
					assert.True(t, background[name], "%s waits for %s, which is no background step before it", s.name, name)
				}
				assert.False(t, background[s.name], "two steps %s", s.name)
				background[s.name] = s.background
			}
			assert.Equal(t, c.want, got)
		})
	}
}

// The names are written down twice, since this program cannot link the harness.
func TestPeers(t *testing.T) {
	assert.ElementsMatch(t, harness.Peers(harness.HandlerCloister), peers)
	assert.ElementsMatch(t, harness.Peers(harness.HandlerRunc), slices.Concat(peers, peersRunc))
	assert.Equal(t, harness.HandlerRunc, handlerRunc)
	assert.Equal(t, harness.HandlerErofs, handlerErofs)
}

// TestPlanWithoutCertificates: a machine that has none yet can download nothing before its set-up.
func TestPlanWithoutCertificates(t *testing.T) {
	for _, s := range plan("", true, false, false) {
		if s.name == stepFetchOwn || s.name == stepFetchPeer {
			assert.Contains(t, s.after, stepSetup, s.name)
		}
	}
}
