// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// BuildConfig says what goes into an image and who may run it.
type BuildConfig struct {
	Sources *Sources
	// Parameters is the kernel's command line. "cloister.tee=se" (see Platform) and, with Initdata, "cloister.initdata=…" are added; a
	// line that contradicts them or asks for debugging is refused.
	Parameters string
	// Initdata is the TOML document that the guest is to accept, as it is in its file; nil: the guest accepts none.
	Initdata []byte
	// HostKeys are the machines that may run the image; see hostkey.Verifier.
	HostKeys []*ecdh.PublicKey
	Options  Options
	// Platform is what the command line tells the guest it runs on; "": tee.SE. tee.Sample makes an image that is only good
	// for being opened and run without the hardware, with NO PROTECTION, because the agent would refuse to run there as SE.
	Platform tee.Name
	// Random is where keys come from; nil: crypto/rand. Tests give one to get the same image twice.
	Random io.Reader
}

// Options of an image. The zero value is the safe one.
type Options struct {
	// CCK is the customer communication key, CCKSize bytes: it opens dumps and authorizes added secrets. nil: a random
	// one that nobody knows.
	CCK []byte
	// AllowDump lets the host take dumps, which the CCK opens. Needs CCK.
	AllowDump bool
	// CCKExtensionSecret makes the CCK necessary for adding secrets to the guest. Needs CCK.
	CCKExtensionSecret bool
	// CCKUpdate lets the guest replace the CCK.
	CCKUpdate bool
	// BackupTargetKeys accepts the machines' backup host keys too.
	BackupTargetKeys bool
	// NoPCKMO takes the protected keys of the CPU's crypto functions away from the guest.
	NoPCKMO bool
	// PCKMOHMAC adds those for HMAC.
	PCKMOHMAC bool
}

func (o Options) flags() (pcf PCF, scf SCF) {
	pcf = DefaultPCF
	if o.NoPCKMO {
		pcf = 0
	}
	for flag, on := range map[PCF]bool{AllowDump: o.AllowDump, BackupTargetKeys: o.BackupTargetKeys, PCKMOHMAC: o.PCKMOHMAC} {
		if on {
			pcf |= flag
		}
	}
	for flag, on := range map[SCF]bool{CCKExtensionSecret: o.CCKExtensionSecret, CCKUpdate: o.CCKUpdate} {
		if on {
			scf |= flag
		}
	}
	return pcf, scf
}

func (o Options) check() error {
	switch {
	case o.CCK != nil && len(o.CCK) != CCKSize:
		return fmt.Errorf("the customer communication key has %d bytes, want %d: %w", len(o.CCK), CCKSize, errdefs.ErrInvalidArgument)
	case o.CCK == nil && (o.AllowDump || o.CCKExtensionSecret):
		return fmt.Errorf("dumps and extension secrets are of use only to who has the customer communication key: give one: %w",
			errdefs.ErrInvalidArgument)
	case o.NoPCKMO && o.PCKMOHMAC:
		return fmt.Errorf("PCKMO cannot be switched off and on: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Image is a boot image in memory.
type Image struct {
	data []byte
	info *Info
	line string
}

// Bytes returns the file's content. It must not be changed.
func (i *Image) Bytes() []byte { return i.data }

// Info is what Inspect shows of the image.
func (i *Image) Info() *Info { return i.info }

// Parameters is the sealed command line.
func (i *Image) Parameters() string { return i.line }

// WriteTo writes the file's content.
func (i *Image) WriteTo(w io.Writer) (int64, error) { return bytes.NewReader(i.data).WriteTo(w) }

// Build makes an image. It needs about twice the memory of all sources. Faults of the input are
// errdefs.ErrInvalidArgument.
func Build(ctx context.Context, cfg BuildConfig) (*Image, error) {
	if cfg.Sources == nil {
		return nil, fmt.Errorf("nothing to build an image from: %w", errdefs.ErrInvalidArgument)
	}
	if err := cfg.Sources.check(); err != nil {
		return nil, err
	}
	if err := cfg.Options.check(); err != nil {
		return nil, err
	}
	platform := cfg.Platform
	if platform == "" {
		platform = tee.SE
	}
	line, err := sealedParameters(platform, cfg.Parameters, cfg.Initdata, cfg.Sources.maxParameters())
	if err != nil {
		return nil, err
	}
	random := cfg.Random
	if random == nil {
		random = rand.Reader
	}
	b, err := newBuilder(random, cfg.HostKeys, cfg.Options)
	if err != nil {
		return nil, err
	}
	data, err := b.build(ctx, cfg.Sources, line)
	if err != nil {
		return nil, err
	}
	info, err := Inspect(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, fmt.Errorf("the image that was built is faulty: %w (%w)", err, errdefs.ErrInternal)
	}
	return &Image{data: data, info: info, line: line}, nil
}

// builder holds the keys of one image.
type builder struct {
	random    io.Reader
	headerKey [hostkey.SecretSize]byte
	secrets   secrets
	header    Header
	xts       *xts
	digests   *digests
	data      []byte
	places    []place
}

func newBuilder(random io.Reader, keys []*ecdh.PublicKey, o Options) (*builder, error) {
	if len(keys) == 0 || len(keys) > MaxHostKeys {
		return nil, fmt.Errorf("%d host keys, want 1 to %d: %w", len(keys), MaxHostKeys, errdefs.ErrInvalidArgument)
	}
	b := &builder{random: random, digests: newDigests()}
	b.header.PCF, b.secrets.scf = o.flags()
	for _, to := range [][]byte{b.headerKey[:], b.secrets.xts[:], b.secrets.cck[:], b.header.IV[:]} {
		if _, err := io.ReadFull(random, to); err != nil {
			return nil, err
		}
	}
	if o.CCK != nil {
		copy(b.secrets.cck[:], o.CCK)
	}
	own, err := hostkey.NewKey(random)
	if err != nil {
		return nil, err
	}
	if b.header.Customer, err = hostkey.Coordinates(own.PublicKey()); err != nil {
		return nil, err
	}
	seen := map[[hostkey.HashSize]byte]bool{}
	for _, key := range keys {
		slot, err := hostkey.Wrap(own, key, b.headerKey)
		if err != nil {
			return nil, err
		}
		hash := [hostkey.HashSize]byte(slot[:])
		if seen[hash] {
			return nil, fmt.Errorf("host key %x is given twice: %w", hash, errdefs.ErrInvalidArgument)
		}
		seen[hash] = true
		b.header.Slots = append(b.header.Slots, slot[:]...)
	}
	b.xts, err = newXTS(b.secrets.xts)
	return b, err
}

func (b *builder) build(ctx context.Context, s *Sources, line string) ([]byte, error) {
	headerAt := max(roundUp(stage3aAddress+uint64(len(s.Stage3a))), headerFloor)
	headerSize := uint64(fixedSize + len(b.header.Slots))
	first := roundUp(headerAt + headerSize)
	b.data = make([]byte, first, first+roundUp(uint64(len(s.Kernel)))+roundUp(uint64(len(s.Initrd)))+maxLineSize+2*MaxStage)

	var args stage3bArguments
	for _, c := range []struct {
		kind    ComponentKind
		content []byte
		arg     *blob
	}{
		{KindKernel, s.Kernel, &args.kernel},
		{KindInitrd, s.Initrd, &args.initrd},
		{KindParameters, append([]byte(line), 0), &args.parameters},
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if len(c.content) == 0 {
			continue
		}
		at, err := b.component(c.kind, c.content)
		if err != nil {
			return nil, err
		}
		*c.arg = blob{at, uint64(len(c.content))}
	}
	stage3b := append(append([]byte(nil), s.Stage3b[:len(s.Stage3b)-stage3bArgs]...), args.marshal()...)
	start, err := b.component(KindStage3b, stage3b)
	if err != nil {
		return nil, err
	}
	b.secrets.start = psw{defaultMask, start}
	b.header.Pages = b.digests.pages
	b.header.PLD, b.header.ALD, b.header.TLD = b.digests.sums()
	if err := b.header.seal(b.headerKey, &b.secrets); err != nil {
		return nil, err
	}
	ipibAt := uint64(len(b.data))
	b.data = append(b.data, marshalIPIB(headerAt, headerSize, b.places)...)
	if len(b.data) > MaxSize {
		return nil, fmt.Errorf("the image has %d bytes, at most %d are possible: %w", len(b.data), MaxSize, errdefs.ErrInvalidArgument)
	}
	copy(b.data[headerAt:], b.header.Marshal())
	copy(b.data[metaAddress:], meta{headerAt, ipibAt}.marshal())
	entry, err := psw{defaultMask, stage3aEntry}.short()
	if err != nil {
		return nil, err
	}
	copy(b.data, entry[:])
	// stage3a's arguments: places relative to their own.
	argsAt := stage3aAddress + uint64(len(s.Stage3a)) - stage3aArgs
	copy(b.data[stage3aAddress:], s.Stage3a)
	for i, v := range []uint64{headerAt - argsAt, headerSize, ipibAt - argsAt} {
		binary.BigEndian.PutUint64(b.data[argsAt+8*uint64(i):], v)
	}
	return b.data, nil
}

// component appends encrypted pages.
func (b *builder) component(kind ComponentKind, content []byte) (address uint64, err error) {
	var r [6]byte
	if _, err := io.ReadFull(b.random, r[:]); err != nil {
		return 0, err
	}
	p := place{prefix: prefixOf(kind, r), address: uint64(len(b.data)), size: roundUp(uint64(len(content)))}
	b.data = append(b.data, content...)
	b.data = append(b.data, make([]byte, p.size-uint64(len(content)))...)
	pages := b.data[p.address:]
	for off := 0; off < len(pages); off += PageSize {
		b.xts.crypt(pages[off:off+PageSize], pageTweak(p.prefix, off), encrypt)
	}
	b.digests.add(p.address, p.prefix, pages)
	b.places = append(b.places, p)
	return p.address, nil
}
