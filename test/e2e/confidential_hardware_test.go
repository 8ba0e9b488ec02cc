// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/test/harness"
)

// teeReport is what `cloister check --tee NAME --json` prints, as far as it matters here.
type teeReport struct {
	Usable    bool
	Node      []teeFinding
	Platforms []struct {
		Platform tee.Name
		Findings []teeFinding
	}
}

type teeFinding struct {
	What, Result, Detail, Fix string
}

func missingOf(all []teeFinding) (missing []teeFinding) {
	for _, f := range all {
		if strings.EqualFold(f.Result, string(tee.Missing)) {
			missing = append(missing, f)
		}
	}
	return missing
}

// checkTEE asks the operator's tool about a platform with the handler's configuration.
func checkTEE(t *testing.T, n *harness.Node, handler string, name tee.Name) (printed string) {
	t.Helper()
	r := run(t, n.Command(testContext(t), filepath.Join(n.Artifacts().Bin, "cloister"), "check", "--tee", string(name), "--json",
		"--config", filepath.Join(n.Dir, handler, "cloister.toml")))
	t.Logf("cloister check --tee %s: %s", name, strings.TrimSpace(r.stderr))
	return r.stdout
}

// parseCheck reads what the tool printed about one platform.
func parseCheck(name tee.Name, printed string) (*teeReport, error) {
	var said teeReport
	switch err := json.Unmarshal([]byte(printed), &said); {
	case err != nil:
		return nil, fmt.Errorf("cloister check printed no JSON (%w): %.200q", err, printed)
	case len(said.Platforms) != 1:
		return nil, fmt.Errorf("cloister check told of %d platforms, %s was asked for: %.500s", len(said.Platforms), name, printed)
	case said.Platforms[0].Platform != name:
		return nil, fmt.Errorf("cloister check told of platform %q, %s was asked for", said.Platforms[0].Platform, name)
	case len(said.Platforms[0].Findings) == 0:
		return nil, fmt.Errorf("cloister check found nothing about %s, neither good nor bad", name)
	}
	return &said, nil
}

// laneReason tells why a platform's lane is left out, in the words of what the tool printed; empty: it can run. What the
// tool should not print is an error: a lane is never left out for a reason that nobody knows.
func laneReason(name tee.Name, printed string) (string, error) {
	said, err := parseCheck(name, printed)
	if err != nil {
		return "", err
	}
	missing := append(missingOf(said.Node), missingOf(said.Platforms[0].Findings)...)
	switch {
	case said.Usable && len(missing) == 0:
		return "", nil
	case said.Usable:
		return "", fmt.Errorf("cloister check calls %s usable and misses %s", name, missing[0].What)
	case len(missing) == 0:
		return "", fmt.Errorf("cloister check calls %s not usable and misses nothing", name)
	}
	var reasons []string
	for _, f := range missing {
		reasons = append(reasons, f.What+": "+f.Detail)
	}
	return fmt.Sprintf("this host cannot launch %s VMs: %s", name, strings.Join(reasons, "; ")), nil
}

// onPlatform lays a platform over a handler's configuration until the test's end.
func onPlatform(t *testing.T, n *harness.Node, handler string, name tee.Name, more string) {
	t.Helper()
	require.NoError(t, n.WriteHandlerDropIn(handler, "60-test", fmt.Sprintf("[tee]\nplatform = %q\n%s", name, more)))
	t.Cleanup(func() { assert.NoError(t, n.RemoveHandlerDropIn(handler, "60-test")) })
}

// handlerOf is the handler of the platform's architecture that has a configuration of its own.
func handlerOf(name tee.Name) string {
	if name == tee.SE {
		return harness.HandlerSealed
	}
	return harness.HandlerSample
}

// reasonLine is a line of tee.UnsupportedError.
var reasonLine = regexp.MustCompile(`(?m)^  - (.*)$`)

// TestConfidentialPlatformsThatThisHostLacks: a pod never falls back to less protection. It fails before anything is made,
// with what is missing and what to do, in the words of `cloister check`.
func TestConfidentialPlatformsThatThisHostLacks(t *testing.T) {
	n := sharedNode(t)
	for _, name := range []tee.Name{tee.SNP, tee.TDX, tee.SE} {
		t.Run(string(name), func(t *testing.T) {
			handler, more := handlerOf(name), ""
			if name == tee.SE {
				if err := n.Artifacts().CheckS390X(); err != nil {
					skipLane(t, err.Error())
				}
				image := filepath.Join(t.TempDir(), "se.img")
				require.NoError(t, os.WriteFile(image, make([]byte, 4096), 0o600))
				more = fmt.Sprintf("[tee.se]\nimage = %q\n", image)
				// The handler emulates, which this platform refuses by itself.
				more += "[hypervisor]\naccel = 'auto'\nvsock = 'auto'\n"
			}
			onPlatform(t, n, handler, name, more)
			checked, err := parseCheck(name, checkTEE(t, n, handler, name))
			require.NoError(t, err)
			missing := missingOf(checked.Platforms[0].Findings)
			if len(missing) == 0 {
				t.Skip("this host has it: see the tests of the platform itself")
			}
			pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: handler})
			if err == nil {
				require.NoError(t, pod.Remove(testContext(t)))
			}
			require.Error(t, err)
			t.Logf("the error: %v", err)
			require.ErrorContains(t, err, "this host cannot launch "+string(name)+" VMs:")
			reasons := reasonLine.FindAllStringSubmatch(err.Error(), -1)
			require.NotEmpty(t, reasons)
			var said []string
			for _, f := range missing {
				said = append(said, fmt.Sprintf("%s: %s; %s", f.What, f.Detail, f.Fix))
			}
			for _, r := range reasons {
				assert.Contains(t, said, r[1], "cloister check says it in other words")
			}
			requireNothingLeft(t, n)
		})
	}
}
