// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor/supervise"
)

const (
	binaryName = "cloud-hypervisor"
	// firstMajor is the first release that carries a half-closed vsock stream (its pull request 8372), which is how the end of
	// a container's standard input reaches the guest. Nothing that a binary says of itself tells it but its version.
	firstMajor = 53

	versionTimeout = 30 * time.Second
	// maxVersion is how much is taken of what a binary says of itself, in bytes.
	maxVersion = 4 << 10
)

// candidates are looked for where PATH has none.
var candidates = []string{"/usr/bin/" + binaryName, "/usr/local/bin/" + binaryName, "/opt/cloud-hypervisor/bin/" + binaryName}

var versionPattern = regexp.MustCompile(`(?m)^cloud-hypervisor v([0-9]{1,4})\.[0-9][^\s]*$`)

// findBinary returns the configured binary, or the first one in the usual places.
func findBinary(configured string) (string, error) {
	if configured != "" {
		switch fi, err := os.Stat(configured); {
		case err != nil:
			return "", fmt.Errorf("the configured Cloud Hypervisor cannot be used: %w; install its release or correct hypervisor.path", err)
		case !executable(fi):
			return "", fmt.Errorf("the configured Cloud Hypervisor %s is no executable file; correct hypervisor.path: %w",
				configured, errdefs.ErrInvalidArgument)
		}
		return configured, nil
	}
	// exec.LookPath refuses what it found relative to the working directory; the shim's is the bundle.
	if p, err := exec.LookPath(binaryName); err == nil && filepath.IsAbs(p) {
		return p, nil
	}
	for _, c := range candidates {
		if fi, err := os.Stat(c); err == nil && executable(fi) {
			return c, nil
		}
	}
	return "", fmt.Errorf("no Cloud Hypervisor found at %v or in PATH; install release v%d or newer, or set hypervisor.path: %w",
		candidates, firstMajor, errdefs.ErrNotFound)
}

func executable(fi os.FileInfo) bool { return fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 }

// askVersion returns what a binary says of its version. One that is older than firstMajor is errdefs.ErrNotImplemented, one
// that is no Cloud Hypervisor errdefs.ErrInvalidArgument.
func askVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	said := bounded{room: maxVersion}
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.Env, cmd.Dir = []string{"LC_ALL=C"}, "/"
	cmd.WaitDelay = time.Second // for what it may have started itself
	err := cmd.Run()
	words := strings.TrimSpace(supervise.Clean(said.String()))
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("hypervisor.path: %s --version: %w; it said: %s", path, err, supervise.Clip(words))
	}
	major, err := parseVersion(words)
	if err != nil {
		return "", fmt.Errorf("hypervisor.path: %s: %w", path, err)
	}
	if major < firstMajor {
		return "", fmt.Errorf("hypervisor.path: %s is %s, whose vsock loses the end of a container's standard input; install v%d or newer: %w",
			path, words, firstMajor, errdefs.ErrNotImplemented)
	}
	return words, nil
}

func parseVersion(words string) (major int, err error) {
	m := versionPattern.FindStringSubmatch(words)
	if m == nil {
		return 0, fmt.Errorf("this says %q for its version (is it a Cloud Hypervisor?): %w", supervise.Clip(words), errdefs.ErrInvalidArgument)
	}
	return strconv.Atoi(m[1])
}

// bounded keeps the first bytes of what is written to it.
type bounded struct {
	bytes.Buffer
	room int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.room)
	b.room -= n
	b.Buffer.Write(p[:n])
	return len(p), nil
}
