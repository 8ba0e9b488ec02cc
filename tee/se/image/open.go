// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/ecdh"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// Unpacked is an image whose components are decrypted and checked.
type Unpacked struct {
	// Info is what Inspect shows.
	Info *Info
	// Kernel, Initrd and Parameters without their padding; Parameters without the NUL.
	Kernel, Initrd []byte
	Parameters     string
	// Stage3b with padding.
	Stage3b []byte
	// CCK is the customer communication key.
	CCK [CCKSize]byte
	SCF SCF

	memory []byte
	start  psw
}

// Open does what the ultravisor does with an image of size bytes: it finds the slot of the private host key, opens the
// header with it, checks the header's tag, PLD, ALD, TLD and number of pages, decrypts the components, and then looks
// whether stage3b is told of the same components. Every fault is an error that says what it is, errdefs.ErrNotFound if
// there is no slot for the key, errdefs.ErrInvalidArgument otherwise. It needs the image's size in memory.
func Open(r io.ReaderAt, size int64, host *ecdh.PrivateKey) (*Unpacked, error) {
	info, err := Inspect(r, size)
	if err != nil {
		return nil, err
	}
	customer, err := hostkey.ParseCoordinates(info.header.Customer[:])
	if err != nil {
		return nil, err
	}
	key, err := hostkey.Unwrap(host, customer, info.header.Slots)
	if err != nil {
		return nil, err
	}
	s, err := info.header.open(key)
	if err != nil {
		return nil, err
	}
	if len(info.places) == 0 {
		return nil, fmt.Errorf("the image has no IPIB at 0x%x, its components are not known: %w", legacyIPIB, errdefs.ErrInvalidArgument)
	}
	u := &Unpacked{Info: info, CCK: s.cck, SCF: s.scf, start: s.start}
	if u.memory, err = readAt(r, 0, int(size), size); err != nil {
		return nil, err
	}
	if err := u.verify(); err != nil {
		return nil, err
	}
	if info.PCF&NoComponentEncryption == 0 {
		x, err := newXTS(s.xts)
		if err != nil {
			return nil, err
		}
		for _, p := range info.places {
			for off := 0; off < int(p.size); off += PageSize {
				at := int(p.address) + off
				x.crypt(u.memory[at:at+PageSize], pageTweak(p.prefix, off), decrypt)
			}
		}
	}
	return u, u.identify()
}

// verify computes what the header says about the components anew.
func (u *Unpacked) verify() error {
	d := newDigests()
	for _, p := range u.Info.places {
		d.add(p.address, p.prefix, u.memory[p.address:p.address+p.size])
	}
	pld, ald, tld := d.sums()
	var faults []error
	for _, f := range []struct {
		same bool
		what string
	}{
		{d.pages == u.Info.Pages, fmt.Sprintf("the header counts %d pages, the IPIB lists %d", u.Info.Pages, d.pages)},
		{pld == u.Info.header.PLD, "the digest of the pages (PLD) is another: a component was changed"},
		{ald == u.Info.header.ALD, "the digest of the addresses (ALD) is another: a component was moved"},
		{tld == u.Info.header.TLD, "the digest of the tweaks (TLD) is another: a tweak was changed"},
	} {
		if !f.same {
			faults = append(faults, errors.New(f.what))
		}
	}
	if faults != nil {
		return fmt.Errorf("the image does not match its header: %w (%w)", errors.Join(faults...), errdefs.ErrInvalidArgument)
	}
	return nil
}

// identify tells the components apart by what starts (the header's PSW) and by what it is told.
func (u *Unpacked) identify() error {
	byAddress := map[uint64][]byte{}
	for _, p := range u.Info.places {
		byAddress[p.address] = u.memory[p.address : p.address+p.size]
	}
	var ok bool
	if u.Stage3b, ok = byAddress[u.start.address]; !ok {
		return fmt.Errorf("the guest starts at 0x%x, where no component is: %w", u.start.address, errdefs.ErrInvalidArgument)
	}
	args, err := findArguments(u.Stage3b)
	if err != nil {
		return err
	}
	delete(byAddress, u.start.address)
	var line []byte
	for _, x := range []struct {
		blob
		kind ComponentKind
		to   *[]byte
	}{{args.kernel, KindKernel, &u.Kernel}, {args.initrd, KindInitrd, &u.Initrd}, {args.parameters, KindParameters, &line}} {
		if x.size == 0 {
			continue
		}
		pages, ok := byAddress[x.address]
		if !ok || x.size > uint64(len(pages)) || roundUp(x.size) != uint64(len(pages)) {
			return fmt.Errorf("stage3b is told of a %s at 0x%x with 0x%x bytes, which is no component: %w", x.kind, x.address, x.size,
				errdefs.ErrInvalidArgument)
		}
		delete(byAddress, x.address)
		*x.to = pages[:x.size]
	}
	switch {
	case len(byAddress) > 0:
		return fmt.Errorf("the image has %d components that stage3b is not told of: %w", len(byAddress), errdefs.ErrInvalidArgument)
	case u.Kernel == nil:
		return fmt.Errorf("the image has no kernel: %w", errdefs.ErrInvalidArgument)
	}
	if line != nil {
		text, terminated := bytes.CutSuffix(line, []byte{0})
		if !terminated || bytes.IndexByte(text, 0) >= 0 {
			return fmt.Errorf("the command line does not end with its only NUL: %w", errdefs.ErrInvalidArgument)
		}
		u.Parameters = string(text)
	}
	return nil
}

// WriteFlat writes the guest's memory as it is when the guest starts: components in clear, and at address 0 a short PSW
// to where the header says that the guest starts. An emulated s390x machine takes the file as its kernel. It is for
// tests and for learning: NO PROTECTION, and all secrets of the image in clear.
func (u *Unpacked) WriteFlat(w io.Writer) error {
	start, err := u.start.short()
	if err != nil {
		return err
	}
	if _, err := w.Write(start[:]); err != nil {
		return err
	}
	_, err = w.Write(u.memory[shortPSWSize:])
	return err
}
