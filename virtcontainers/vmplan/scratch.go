// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloister-project/cloister/hypervisor"
)

// ScratchSerial is the serial number of a pod's scratch disk.
const ScratchSerial = "scratch"

// ScratchFile is the file of the pod's scratch disk; empty if the pod has none. A confidential guest encrypts it.
func (p *Plan) ScratchFile() string {
	if p.cfg.Scratch.SizeMiB == 0 {
		return ""
	}
	return filepath.Join(p.cfg.Scratch.Dir, filepath.Base(p.StateDir())+".img")
}

// WriteScratch makes the file of the scratch disk, sparse. Who calls it removes the file.
func (p *Plan) WriteScratch() error {
	path := p.ScratchFile()
	if path == "" {
		return nil
	}
	fault := func(err error) error {
		return fmt.Errorf("scratch disk (scratch.dir = %q): %w", p.cfg.Scratch.Dir, err)
	}
	if err := os.MkdirAll(p.cfg.Scratch.Dir, 0o700); err != nil {
		return fault(err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fault(err)
	}
	if err := errors.Join(f.Truncate(int64(p.cfg.Scratch.SizeMiB)<<20), f.Close()); err != nil {
		return fault(errors.Join(err, os.Remove(path)))
	}
	return nil
}

// scratchDisk is the scratch disk in the VM's document.
func (p *Plan) scratchDisk() hypervisor.Disk {
	return hypervisor.Disk{ID: ScratchSerial, Path: p.ScratchFile(), Serial: ScratchSerial}
}
