// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/initdata"
)

// initdataDisk is the name of initdata's disk image in the sandbox's state directory.
const initdataDisk = "initdata.img"

// loadInitdata takes the pod's own document, or else the node's, and checks it; nil without one.
func loadInitdata(cfg *configs.Config) (*initdata.Document, error) {
	var (
		raw  []byte
		from string
		err  error
	)
	switch {
	case cfg.TEE.InitdataAnnotation != "":
		from = "the pod's initdata"
		raw, err = initdata.DecodeAnnotation(cfg.TEE.InitdataAnnotation)
	case cfg.TEE.Initdata != "":
		from = "tee.initdata = " + cfg.TEE.Initdata
		raw, err = readSmall(cfg.TEE.Initdata, initdata.MaxRaw)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	doc, err := initdata.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return doc, nil
}

// readSmall reads a regular file of at most so many bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", path, limit, errdefs.ErrInvalidArgument)
	}
	return b, nil
}

// InitdataDigest as the guest says it in its Hello; empty: there is no initdata.
func (p *Plan) InitdataDigest() string {
	if p.initdata == nil {
		return ""
	}
	return p.initdata.String()
}

// initdataDisk is the read-only disk that brings the document to the guest.
func (p *Plan) initdataDisk() hypervisor.Disk {
	return hypervisor.Disk{ID: "initdata", Path: filepath.Join(p.StateDir(), initdataDisk), Serial: wire.InitdataSerial, ReadOnly: true}
}

// WriteInitdata makes the image of initdata's disk in the sandbox's state directory, if there is initdata. Nobody writes it
// again, the VMM neither.
func (p *Plan) WriteInitdata() error {
	if p.initdata == nil {
		return nil
	}
	f, err := os.OpenFile(p.initdataDisk().Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return fmt.Errorf("disk with the pod's initdata: %w", err)
	}
	if err := errors.Join(initdata.WriteDisk(f, p.initdata.Raw), f.Close()); err != nil {
		return fmt.Errorf("disk with the pod's initdata: %w", err)
	}
	return nil
}
