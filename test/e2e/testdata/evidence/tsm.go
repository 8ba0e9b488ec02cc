// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// tsmSaid is what configfs-tsm answered.
type tsmSaid struct {
	// Provider is the kernel's driver: "sev_guest" or "tdx_guest".
	Provider string `json:"provider"`
	Report   []byte `json:"report"`
}

// tsmReport asks the guest's kernel for a report (Linux, Documentation/ABI/testing/configfs-tsm). The container has no
// configfs of its own; it is one for the whole kernel, and mounted here a second time.
func tsmReport(nonce []byte) (_ *tsmSaid, err error) {
	if len(nonce) != 64 {
		return nil, fmt.Errorf("a nonce of %d bytes, want 64", len(nonce))
	}
	dir, err := os.MkdirTemp("", "configfs-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	switch err := unix.Mount("configfs", dir, "configfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); {
	case errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("no configfs: this guest's kernel does not have the file system, which guests of SEV-SNP and TDX load (mount: %w)",
			err)
	case err != nil:
		return nil, fmt.Errorf("mount configfs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()

	entry := filepath.Join(dir, "tsm", "report", "evidence")
	switch err := os.Mkdir(entry, 0o700); {
	case errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("no configfs-tsm provider: neither sev-guest nor tdx-guest found its hardware (%w)", err)
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("no configfs-tsm: this guest's kernel has not loaded tsm (%w)", err)
	case err != nil:
		return nil, fmt.Errorf("make an entry in configfs-tsm: %w", err)
	}
	defer func() { err = errors.Join(err, os.Remove(entry)) }()
	provider, err := os.ReadFile(filepath.Join(entry, "provider"))
	if err != nil {
		return nil, fmt.Errorf("ask configfs-tsm for its provider: %w", err)
	}
	// One write: the kernel takes what it gets until the file is closed.
	if err := os.WriteFile(filepath.Join(entry, "inblob"), nonce, 0); err != nil {
		return nil, fmt.Errorf("give the nonce: %w", err)
	}
	report, err := os.ReadFile(filepath.Join(entry, "outblob"))
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	return &tsmSaid{Provider: strings.TrimSpace(string(provider)), Report: report}, nil
}
