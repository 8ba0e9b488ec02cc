// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// seed is a stream of bytes that is the same in each run.
func seed(n byte) *mathrand.ChaCha8 { return mathrand.NewChaCha8([32]byte{n}) }

func newHost(t testing.TB, n byte) *ecdh.PrivateKey {
	t.Helper()
	key, err := hostkey.NewKey(seed(n))
	require.NoError(t, err)
	return key
}

// testSources look like the real files where Build looks.
func testSources() *Sources {
	kernel := bytes.Repeat([]byte("kernel"), 20000)
	copy(kernel[kernelMagicAt:], kernelMagic)
	binary.BigEndian.PutUint64(kernel[kernelLineSizeAt:], 4096)
	return &Sources{
		Kernel:  kernel,
		Initrd:  bytes.Repeat([]byte("initrd"), 3000),
		Stage3a: append(bytes.Repeat([]byte{0x3a}, 11200), make([]byte, stage3aArgs)...),
		Stage3b: append(bytes.Repeat([]byte{0x3b}, 5524), make([]byte, stage3bArgs)...),
	}
}

const testDocument = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n\n[data]\n\"policy.toml\" = \"x = 1\"\n"

func testImage(t testing.TB, change func(*BuildConfig)) *Image {
	t.Helper()
	cfg := BuildConfig{
		Sources:    testSources(),
		Parameters: "console=ttyS0  panic=-1",
		Initdata:   []byte(testDocument),
		HostKeys:   []*ecdh.PublicKey{newHost(t, 1).PublicKey(), newHost(t, 2).PublicKey()},
		Random:     seed(9),
	}
	if change != nil {
		change(&cfg)
	}
	img, err := Build(context.Background(), cfg)
	require.NoError(t, err)
	return img
}

func open(b []byte, host *ecdh.PrivateKey) (*Unpacked, error) {
	return Open(bytes.NewReader(b), int64(len(b)), host)
}

func TestBuildAndOpen(t *testing.T) {
	src := testSources()
	img := testImage(t, nil)
	d, err := initdata.Parse([]byte(testDocument))
	require.NoError(t, err)
	line := "console=ttyS0 panic=-1 cloister.tee=se cloister.initdata=" + hex.EncodeToString(initdata.Bind(d.Digest(), 64))
	require.Equal(t, line, img.Parameters())
	for n := byte(1); n <= 2; n++ {
		u, err := open(img.Bytes(), newHost(t, n))
		require.NoError(t, err)
		require.Equal(t, src.Kernel, u.Kernel)
		require.Equal(t, src.Initrd, u.Initrd)
		require.Equal(t, line, u.Parameters)
		require.Equal(t, src.Stage3b[:5000], u.Stage3b[:5000])
		require.Zero(t, u.SCF)
	}
	_, err = open(img.Bytes(), newHost(t, 3))
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	require.Equal(t, img.Bytes(), testImage(t, nil).Bytes(), "the same keys give the same image")
	other := testImage(t, func(c *BuildConfig) { c.Random = nil })
	require.NotEqual(t, img.Info().Tag, other.Info().Tag)
	require.NotEqual(t, img.Info().CustomerKey, other.Info().CustomerKey)
	var written bytes.Buffer
	_, err = img.WriteTo(&written)
	require.NoError(t, err)
	require.Equal(t, img.Bytes(), written.Bytes())
}

func TestNoSourceIsReadable(t *testing.T) {
	b := testImage(t, nil).Bytes()
	for _, text := range []string{"kernelkernel", "initrdinitrd", "console=", "cloister."} {
		require.False(t, bytes.Contains(b, []byte(text)), text)
	}
}

func TestEveryChangeIsFound(t *testing.T) {
	host := newHost(t, 1)
	img := testImage(t, nil)
	b := img.Bytes()
	info := img.Info()
	h := info.HeaderAddress
	places := map[string]uint64{
		"magic": h, "version": h + 11, "size": h + 15, "iv": h + 0x10, "reserved": h + 0x1c, "slots": h + 0x27, "sea": h + 0x2f,
		"pages": h + 0x37, "pcf": h + 0x3f, "customer": h + 0x60, "pld": h + 0xe0, "ald": h + 0x120, "tld": h + 0x160,
		"hash": h + 0x1a0, "wrapped key": h + 0x1c0, "slot tag": h + 0x1e0, "other slot": h + 0x1f0,
		"encrypted": h + 0x240, "tag": h + 0x240 + 128, "last": h + uint64(info.HeaderSize) - 1,
	}
	for _, c := range info.Components {
		places["first of "+string(c.Kind)] = c.Address
		places["last of "+string(c.Kind)] = c.Address + c.Size - 1
	}
	ipib := uint64(len(b)) - uint64(len(marshalIPIB(0, 0, info.places)))
	for i := range info.Components {
		e := ipib + ipibFixed + uint64(i)*ipibEntry
		places["prefix "+string(info.Components[i].Kind)] = e + 3
		places["address "+string(info.Components[i].Kind)] = e + 14
		places["size "+string(info.Components[i].Kind)] = e + 22
	}
	for name, at := range places {
		changed := bytes.Clone(b)
		changed[at] ^= 0x10
		u, err := open(changed, host)
		require.Error(t, err, name)
		require.Nil(t, orNil(u, err), name)
		require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err), "%s: %v", name, err)
	}
	for name, want := range map[string]string{"first of kernel": "PLD", "prefix initrd": "TLD", "tag": "tag is not right",
		"pcf": "tag is not right", "customer": "P-521"} {
		changed := bytes.Clone(b)
		changed[places[name]] ^= 0x10
		_, err := open(changed, host)
		require.ErrorContains(t, err, want, name)
	}
}

func orNil(u *Unpacked, err error) *Unpacked {
	if err != nil {
		return nil
	}
	return u
}

func TestMovedAndSwappedComponents(t *testing.T) {
	host := newHost(t, 1)
	img := testImage(t, nil)
	info := img.Info()
	ipib := len(img.Bytes()) - len(marshalIPIB(0, 0, info.places))
	move := func(change func([]place) []place) error {
		b := bytes.Clone(img.Bytes())[:ipib]
		b = append(b, marshalIPIB(info.HeaderAddress, uint64(info.HeaderSize), change(append([]place(nil), info.places...)))...)
		_, err := open(b, host)
		return err
	}
	require.NoError(t, move(func(p []place) []place { return p }))
	require.ErrorContains(t, move(func(p []place) []place { return p[1:] }), "counts")
	require.ErrorContains(t, move(func(p []place) []place { p[1].address += PageSize; p[1].size -= PageSize; return p }), "counts")
	require.ErrorContains(t, move(func(p []place) []place { p[0], p[1] = p[1], p[0]; return p }), "lies over")
	require.ErrorContains(t, move(func(p []place) []place { p[0].address = info.HeaderAddress; return p }), "lies over")
	require.ErrorContains(t, move(func(p []place) []place { p[3].size = 1 << 40; return p }), "past the image's end")
	require.ErrorContains(t, move(func(p []place) []place { p[3].address = ^uint64(0) - PageSize + 1; return p }), "past the image's end")
}

func TestFlat(t *testing.T) {
	img := testImage(t, nil)
	u, err := open(img.Bytes(), newHost(t, 1))
	require.NoError(t, err)
	var flat bytes.Buffer
	require.NoError(t, u.WriteFlat(&flat))
	b := flat.Bytes()
	require.Len(t, b, len(img.Bytes()))
	c := img.Info().Components
	require.Equal(t, uint64(0x0008000180000000)|c[3].Address, binary.BigEndian.Uint64(b))
	require.Equal(t, u.Kernel, b[c[0].Address:int(c[0].Address)+len(u.Kernel)])
	require.Equal(t, img.Bytes()[8:c[0].Address], b[8:c[0].Address])
}

func TestNoInitrdAndOptions(t *testing.T) {
	cck := bytes.Repeat([]byte{7}, CCKSize)
	img := testImage(t, func(c *BuildConfig) {
		c.Sources.Initrd, c.Initdata = nil, nil
		c.Options = Options{CCK: cck, AllowDump: true, CCKExtensionSecret: true, CCKUpdate: true, BackupTargetKeys: true, PCKMOHMAC: true}
	})
	require.Equal(t, "console=ttyS0 panic=-1 cloister.tee=se", img.Parameters())
	u, err := open(img.Bytes(), newHost(t, 2))
	require.NoError(t, err)
	require.Nil(t, u.Initrd)
	require.Equal(t, cck, u.CCK[:])
	require.Equal(t, []string{"cck-extension-secret", "cck-update"}, u.SCF.Names())
	require.Equal(t, SCF(0x6000000000000000), u.SCF)
	require.Equal(t, []string{"allow-dump", "pckmo-dea", "pckmo-aes", "pckmo-ecc", "pckmo-hmac", "backup-target-keys"}, img.Info().PCF.Names())
	require.Equal(t, PCF(0x200000f2), img.Info().PCF)
	img = testImage(t, func(c *BuildConfig) { c.Options.NoPCKMO = true })
	require.Zero(t, img.Info().PCF)
	require.Equal(t, []string{"unknown-0", "no-component-encryption"}, (PCF(1<<63) | NoComponentEncryption).Names())
}

func TestBuildRefuses(t *testing.T) {
	tests := map[string]struct {
		change func(*BuildConfig)
		says   string
	}{
		"no sources":       {func(c *BuildConfig) { c.Sources = nil }, "nothing to build"},
		"ELF":              {func(c *BuildConfig) { copy(c.Sources.Kernel, "\x7fELF") }, "ELF"},
		"another kernel":   {func(c *BuildConfig) { c.Sources.Kernel[kernelMagicAt] = 0 }, "S390EP"},
		"short kernel":     {func(c *BuildConfig) { c.Sources.Kernel = c.Sources.Kernel[:0x10010] }, "S390EP"},
		"stage3a twice":    {func(c *BuildConfig) { c.Sources.Stage3a[len(c.Sources.Stage3a)-1] = 1 }, "stage3a.bin"},
		"short stage3a":    {func(c *BuildConfig) { c.Sources.Stage3a = make([]byte, 100) }, "stage3a.bin"},
		"stage3b twice":    {func(c *BuildConfig) { c.Sources.Stage3b[len(c.Sources.Stage3b)-1] = 1 }, "stage3b_reloc.bin"},
		"long stage3b":     {func(c *BuildConfig) { c.Sources.Stage3b = make([]byte, MaxStage+1) }, "stage3b_reloc.bin"},
		"no keys":          {func(c *BuildConfig) { c.HostKeys = nil }, "0 host keys"},
		"a key twice":      {func(c *BuildConfig) { c.HostKeys = append(c.HostKeys, c.HostKeys[0]) }, "twice"},
		"another curve":    {func(c *BuildConfig) { c.HostKeys[0] = p256(t) }, "P-521"},
		"too many keys":    {func(c *BuildConfig) { c.HostKeys = make([]*ecdh.PublicKey, MaxHostKeys+1) }, "want 1 to"},
		"short CCK":        {func(c *BuildConfig) { c.Options.CCK = []byte{1} }, "1 bytes, want 32"},
		"dump without CCK": {func(c *BuildConfig) { c.Options.AllowDump = true }, "customer communication key"},
		"ext. without CCK": {func(c *BuildConfig) { c.Options.CCKExtensionSecret = true }, "customer communication key"},
		"PCKMO off and on": {func(c *BuildConfig) { c.Options.NoPCKMO, c.Options.PCKMOHMAC = true, true }, "PCKMO"},
		"another platform": {func(c *BuildConfig) { c.Parameters = "cloister.tee=none" }, "another platform"},
		"quoted platform":  {func(c *BuildConfig) { c.Parameters = `"cloister.tee=none"` }, "another platform"},
		"platform of AMD":  {func(c *BuildConfig) { c.Platform = tee.SNP }, "cannot be for platform"},
		"initdata by hand": {func(c *BuildConfig) { c.Parameters = "cloister.initdata=00" }, "give the document"},
		"debug":            {func(c *BuildConfig) { c.Parameters = "cloister.debug" }, "open the guest"},
		"debug with value": {func(c *BuildConfig) { c.Parameters = "cloister.debug_console=1" }, "open the guest"},
		"line feed":        {func(c *BuildConfig) { c.Parameters = "a\nb" }, "printable"},
		"NUL":              {func(c *BuildConfig) { c.Parameters = "a\x00b" }, "printable"},
		"not ASCII":        {func(c *BuildConfig) { c.Parameters = "ä" }, "printable"},
		"too long":         {func(c *BuildConfig) { c.Parameters = strings.Repeat("x", 4096) }, "takes 4095"},
		"too long, default": {func(c *BuildConfig) {
			clear(c.Sources.Kernel[kernelLineSizeAt : kernelLineSizeAt+8])
			c.Parameters = strings.Repeat("x", 800)
		}, "takes 895"},
		"initdata": {func(c *BuildConfig) { c.Initdata = []byte("=") }, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := BuildConfig{Sources: testSources(), Initdata: []byte(testDocument), HostKeys: []*ecdh.PublicKey{newHost(t, 1).PublicKey()}}
			tt.change(&cfg)
			_, err := Build(context.Background(), cfg)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tt.says)
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Build(ctx, BuildConfig{Sources: testSources(), HostKeys: []*ecdh.PublicKey{newHost(t, 1).PublicKey()}})
	require.ErrorIs(t, err, context.Canceled)
}

func p256(t *testing.T) *ecdh.PublicKey {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	require.NoError(t, err)
	return key.PublicKey()
}

func TestParametersKeepTheOwnersOrder(t *testing.T) {
	line, err := sealedParameters(tee.SE, " a  b=1 cloister.tee=se c ", nil, 100)
	require.NoError(t, err)
	require.Equal(t, "a b=1 c cloister.tee=se", line)
	line, err = sealedParameters(tee.Sample, "", nil, 100)
	require.NoError(t, err)
	require.Equal(t, "cloister.tee=sample", line)
	// What the agent refuses is not sealed.
	for _, word := range []string{"cloister.tees=se", "x=cloister.tee", "cloister.initdatas", "-cloister.tee=se", `"cloister.initdata"=00`} {
		_, err = sealedParameters(tee.SE, word, nil, 100)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, word)
	}
}

func TestMaxHostKeys(t *testing.T) {
	require.Equal(t, 95, MaxHostKeys, "8 KiB hold 560 bytes and 95 slots")
	img := testImage(t, func(c *BuildConfig) {
		c.HostKeys = nil
		for n := range MaxHostKeys {
			c.HostKeys = append(c.HostKeys, newHost(t, byte(n)).PublicKey())
		}
	})
	require.Len(t, img.Info().HostKeyHashes, MaxHostKeys)
	_, err := open(img.Bytes(), newHost(t, MaxHostKeys-1))
	require.NoError(t, err)
}

func TestInspect(t *testing.T) {
	img := testImage(t, nil)
	path := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(path, img.Bytes(), 0o600))
	info, err := InspectFile(path)
	require.NoError(t, err)
	require.Equal(t, img.Info(), info)
	require.Equal(t, LayoutCurrent, info.Layout)
	require.Equal(t, []ComponentKind{KindKernel, KindInitrd, KindParameters, KindStage3b}, []ComponentKind{
		info.Components[0].Kind, info.Components[1].Kind, info.Components[2].Kind, info.Components[3].Kind,
	})
	hash, err := hostkey.Hash(newHost(t, 2).PublicKey())
	require.NoError(t, err)
	require.Equal(t, Hex(hash[:]), info.HostKeyHashes[1])

	text, err := json.Marshal(info)
	require.NoError(t, err)
	var shown map[string]any
	require.NoError(t, json.Unmarshal(text, &shown))
	require.Equal(t, info.Tag.String(), shown["tag"])
	require.Equal(t, map[string]any{"value": "0x00000000000000e0", "flags": []any{"pckmo-dea", "pckmo-aes", "pckmo-ecc"}}, shown["pcf"])

	_, err = InspectFile(t.TempDir())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = InspectFile(path + "none")
	require.ErrorIs(t, err, os.ErrNotExist)
	kernel := testSources().Kernel
	_, err = Inspect(bytes.NewReader(kernel), int64(len(kernel)))
	require.ErrorIs(t, err, ErrNoImage)
	_, err = Inspect(bytes.NewReader(nil), 0)
	require.ErrorIs(t, err, ErrNoImage)
	_, err = Inspect(bytes.NewReader(nil), MaxSize+1)
	require.ErrorContains(t, err, "limit")
	_, err = Inspect(bytes.NewReader(img.Bytes()[:0x14100]), int64(len(img.Bytes())))
	require.ErrorContains(t, err, "ended")
}

// TestLegacyLayout: the older tool has no mark, its IPIB at 0x13000 without the header's place, and other prefixes.
func TestLegacyLayout(t *testing.T) {
	img := testImage(t, func(c *BuildConfig) { c.Sources.Stage3a = append(make([]byte, 0x2000), make([]byte, stage3aArgs)...) })
	b := bytes.Clone(img.Bytes())
	list := b[len(b)-len(marshalIPIB(0, 0, img.info.places)):]
	clear(list[120:136])
	copy(b[legacyIPIB:], list)
	b = b[:len(b)-len(list)]
	clear(b[metaAddress : metaAddress+metaSize])
	info, err := Inspect(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Equal(t, LayoutLegacy, info.Layout)
	require.Equal(t, img.Info().Tag, info.Tag)
	require.Len(t, info.Components, 4)
	u, err := open(b, newHost(t, 1))
	require.NoError(t, err)
	require.Equal(t, testSources().Kernel, u.Kernel)

	clear(b[legacyIPIB : legacyIPIB+PageSize])
	info, err = Inspect(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Empty(t, info.Components)
	_, err = open(b, newHost(t, 1))
	require.ErrorContains(t, err, "no IPIB")
}

func TestReadSources(t *testing.T) {
	s := testSources()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		return path
	}
	kernel, initrd := write("kernel", s.Kernel), write("initrd", s.Initrd)
	write("stage3a.bin", s.Stage3a)
	_, err := ReadSources(kernel, initrd, dir)
	require.ErrorIs(t, err, os.ErrNotExist)
	write("stage3b_reloc.bin", s.Stage3b)
	got, err := ReadSources(kernel, initrd, dir)
	require.NoError(t, err)
	require.Equal(t, s, got)
	got, err = ReadSources(kernel, "", dir)
	require.NoError(t, err)
	require.Nil(t, got.Initrd)
	_, err = ReadSources(initrd, "", dir)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}
