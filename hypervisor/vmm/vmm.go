// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/cloudhypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
)

// Config of a driver.
type Config struct {
	// Kind of the VMM; one of Kinds.
	Kind string
	// Path of the VMM's binary; empty: it is searched in the usual places.
	Path string
	// Arch of the guests; empty: the host's.
	Arch hypervisor.Architecture
	// CacheDir keeps what is known of binaries, a directory below it for each kind; made if missing. Empty: each driver
	// asks its binary anew.
	CacheDir string
}

// Kinds returns the names of all VMMs.
func Kinds() []string { return []string{qemu.Kind, cloudhypervisor.Kind} }

// New returns the driver. It touches nothing: the binary is looked for when it is needed. A kind that is not known is
// errdefs.ErrInvalidArgument.
func New(c Config) (hypervisor.Driver, error) {
	dir := ""
	if c.CacheDir != "" {
		dir = filepath.Join(c.CacheDir, c.Kind)
	}
	switch c.Kind {
	case qemu.Kind:
		return qemu.New(qemu.Config{Arch: c.Arch, Path: c.Path, CacheDir: dir}), nil
	case cloudhypervisor.Kind:
		return cloudhypervisor.New(cloudhypervisor.Config{Arch: c.Arch, Path: c.Path}), nil
	}
	return nil, fmt.Errorf("hypervisor.kind = %q is not known; known are %s: %w", c.Kind, strings.Join(Kinds(), ", "),
		errdefs.ErrInvalidArgument)
}
