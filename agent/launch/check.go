// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/report"
)

// Guest is what Check looks at.
type Guest struct {
	// ReadHardware asks the hardware of a platform what it launched (report.Hardware.Read). It is not called for sample.
	ReadHardware func(platform abi.Platform) (*report.Launch, error)
	// OpenDisk waits for the disk with the serial number until ctx ends, and opens it for reading.
	OpenDisk func(ctx context.Context, serial string) (io.ReadCloser, error)
	// HasDisk reports whether there is one now.
	HasDisk func(serial string) (bool, error)
}

// diskWait is how long the disk with initdata may take; it is there from the VM's start.
const diskWait = 15 * time.Second

// Check holds the launch against the hardware and initdata against what was bound. It returns the initdata document; nil
// when none was bound. With an error the guest must not go on.
func (l Launch) Check(ctx context.Context, g Guest) (*initdata.Document, error) {
	if !l.Confidential() {
		return nil, nil
	}
	bound := l.bound
	if l.Platform != abi.Sample {
		launched, err := g.ReadHardware(l.Platform)
		if err != nil {
			return nil, fmt.Errorf("this guest was made for platform %s: %w", l.Platform, err)
		}
		if launched.Debug {
			// Configuration allows it (tee.allow_debug), and a verifier sees it in the evidence.
			log.G(ctx).Warn("this guest is launched for debugging: NO PROTECTION, the host can read its memory")
		}
		if l.Platform != abi.SE {
			if bound = launched.Bound; len(bound) == 0 {
				return nil, fmt.Errorf("the hardware's report of platform %s binds nothing: %w", l.Platform, errdefs.ErrFailedPrecondition)
			}
		}
	}
	if len(bytes.Trim(bound, "\x00")) == 0 {
		found, err := g.HasDisk(wire.InitdataSerial)
		if err != nil {
			return nil, fmt.Errorf("look for a disk with initdata: %w", err)
		}
		if found {
			return nil, fmt.Errorf("there is a disk with initdata, and the launch is not bound to any: the host added it: %w",
				errdefs.ErrFailedPrecondition)
		}
		return nil, nil
	}
	return readInitdata(ctx, g, bound)
}

func readInitdata(ctx context.Context, g Guest, bound []byte) (*initdata.Document, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, diskWait, errors.New("it is not there"))
	defer cancel()
	disk, err := g.OpenDisk(ctx, wire.InitdataSerial)
	if err != nil {
		return nil, fmt.Errorf("the launch is bound to initdata, whose disk is missing: %w", err)
	}
	defer disk.Close()
	raw, err := initdata.ReadDisk(disk)
	if err != nil {
		return nil, err
	}
	doc, err := initdata.Parse(raw)
	if err != nil {
		return nil, err
	}
	// No secret is compared, so that it need not take constant time.
	if got := initdata.Bind(doc.Digest(), len(bound)); !bytes.Equal(got, bound) {
		return nil, fmt.Errorf("initdata on the disk has digest %s, the launch is bound to %x: it is another document: %w",
			doc, bound, errdefs.ErrFailedPrecondition)
	}
	return doc, nil
}
