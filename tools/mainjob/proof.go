// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cloister-project/cloister/test/harness"
)

const kernelRelease = "kernel release"

// prove compares what a container sees of the kernel it runs on with what the host has. The boot id is the proof
// proper: the kernel draws it anew at each boot, so it differs if and only if another kernel runs. The release may
// happen to be the same where the host runs the very kernel that the guest image was made from; it counts as proof only
// otherwise.
func (j *job) prove(ctx context.Context) (string, error) {
	inside := func(command ...string) (string, error) {
		out, err := j.client.Output(ctx, command...)
		return clean(out), err
	}
	for _, p := range []struct {
		what         string
		inside, host func() (string, error)
	}{
		{
			kernelRelease,
			func() (string, error) { return inside("uname", "-r") },
			func() (string, error) { return hostCommand("uname", "-r") },
		},
		{
			"boot id",
			func() (string, error) { return inside("cat", "/proc/sys/kernel/random/boot_id") },
			func() (string, error) { return hostFile("/proc/sys/kernel/random/boot_id") },
		},
		{
			"PID 1",
			func() (string, error) { return inside("cat", "/proc/1/cmdline") },
			func() (string, error) { return hostFile("/proc/1/cmdline") },
		},
	} {
		in, err := p.inside()
		if err != nil {
			return "", err
		}
		host, err := p.host()
		if err != nil {
			return "", err
		}
		j.report.proof = append(j.report.proof, comparison{p.what, in, host})
	}
	release, err := guestRelease()
	if err != nil {
		return "", err
	}
	return "kernel release, boot id and PID 1 are not the host's", verdict(j.report.proof, release)
}

// verdict is an error that says what of the proof fails, given the kernel release of the guest image.
func verdict(proof []comparison, release string) error {
	var faults []string
	for _, c := range proof {
		if c.what == kernelRelease {
			if c.inside != release {
				faults = append(faults, fmt.Sprintf("the kernel in the container is %q, the guest image has %q", c.inside, release))
			}
			if c.host == release {
				continue
			}
		}
		if c.inside == c.host || c.inside == "" {
			faults = append(faults, fmt.Sprintf("%s is %q in the container and %q on the host", c.what, c.inside, c.host))
		}
	}
	if len(faults) > 0 {
		return fmt.Errorf("this is no VM: %s", strings.Join(faults, "; "))
	}
	return nil
}

// clean makes one short printable line of what a file or a command gave: a guest's bytes are shown at a terminal.
func clean(s string) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s))
	if runes := []rune(s); len(runes) > 60 {
		s = string(runes[:59]) + "…"
	}
	return s
}

// guestRelease is the kernel release that the guest image was made with.
func guestRelease() (string, error) {
	modules, err := harness.SetupValue("CLOISTER_MODULES")
	if err != nil {
		return "", err
	}
	return filepath.Base(modules), nil
}

func hostFile(path string) (string, error) {
	data, err := os.ReadFile(path)
	return clean(string(data)), err
}

func hostCommand(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).Output()
	return clean(string(out)), err
}
