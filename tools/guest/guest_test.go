// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

const release = "6.12.0-test"

// fakeELF makes an ELF file with one section, and a program header of the type if it is not PT_NULL.
func fakeELF(section string, content []byte, prog elf.ProgType) []byte {
	return fakeELFFor(elf.EM_X86_64, section, content, prog)
}

func fakeELFFor(machine elf.Machine, section string, content []byte, prog elf.ProgType) []byte {
	names := "\x00.shstrtab\x00" + section + "\x00"
	const headSize, progSize, sectionSize = 64, 56, 64
	dataAt := uint64(headSize + progSize)
	namesAt := dataAt + uint64(len(content))
	sectionsAt := namesAt + uint64(len(names))
	var out bytes.Buffer
	order, data := binary.ByteOrder(binary.LittleEndian), elf.ELFDATA2LSB
	if machine == elf.EM_S390 {
		order, data = binary.BigEndian, elf.ELFDATA2MSB
	}
	write := func(v any) { _ = binary.Write(&out, order, v) }
	write(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, byte(data), 1}, Type: uint16(elf.ET_REL), Machine: uint16(machine), Version: 1,
		Phoff: headSize, Shoff: sectionsAt, Ehsize: headSize, Phentsize: progSize, Phnum: 1, Shentsize: sectionSize, Shnum: 3, Shstrndx: 1,
	})
	write(elf.Prog64{Type: uint32(prog)})
	out.Write(content)
	out.WriteString(names)
	write(elf.Section64{})
	write(elf.Section64{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))})
	write(elf.Section64{Name: 11, Type: uint32(elf.SHT_PROGBITS), Off: dataAt, Size: uint64(len(content))})
	return out.Bytes()
}

func fakeModule(info ...string) []byte { return fakeModuleFor(elf.EM_X86_64, info...) }

func fakeModuleFor(machine elf.Machine, info ...string) []byte {
	return fakeELFFor(machine, ".modinfo", []byte(strings.Join(info, "\x00")+"\x00"), elf.PT_NULL)
}

func sign(module []byte) []byte {
	out := append(bytes.Clone(module), "signature"...)
	out = append(out, make([]byte, 8)...)
	out = binary.BigEndian.AppendUint32(out, uint32(len("signature")))
	return append(out, "~Module signature appended~\n"...)
}

func fakeKernel(version string) []byte {
	image := make([]byte, 0x1000)
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x20e:], 0x600)
	copy(image[0x800:], version)
	return image
}

func fakeS390XKernel(version string) []byte {
	image := make([]byte, 0x12000)
	copy(image[0x10008:], "S390EP")
	binary.BigEndian.PutUint64(image[0x10428:], 0x11000)
	copy(image[0x11000:], version)
	return image
}

// fakeInputs makes a kernel, an agent and modules: every wanted one, of which virtio_net needs a (soft: b), a needs c.
func fakeInputs(t *testing.T) inputs {
	t.Helper()
	dir := t.TempDir()
	in := inputs{
		Arch: "amd64", Kernel: filepath.Join(dir, "vmlinuz"), Modules: filepath.Join(dir, release), Agent: filepath.Join(dir, "agent"),
		Out: filepath.Join(dir, "out"), Version: "v1", Compression: "none",
	}
	require.NoError(t, os.WriteFile(in.Kernel, fakeKernel(release+" (builder) #1"), 0o600))
	require.NoError(t, os.WriteFile(in.Agent, fakeELF(".text", []byte("agent"), elf.PT_LOAD), 0o700))
	for _, w := range architectures["amd64"].wanted() {
		switch w.name {
		case "virtio_net":
			addModule(t, in, "drivers/virtio-net.ko.xz", "vermagic="+release+" SMP", "depends=a", "softdep=pre: b missing post: d")
		case "virtio_blk":
			// built in
		case "sev_guest", "tdx_guest":
			addModule(t, in, "coco/"+w.name+".ko", "vermagic="+release+" SMP", "depends=tsm,c-c")
		default:
			addModule(t, in, "x/"+w.name+".ko", "vermagic="+release+" SMP", "depends=")
		}
	}
	addModule(t, in, "lib/a.ko", "vermagic="+release+" SMP", "depends=c-c,built-in")
	addModule(t, in, "lib/b.ko", "vermagic="+release+" SMP")
	addModule(t, in, "lib/c-c.ko", "vermagic="+release+" SMP")
	addModule(t, in, "lib/d.ko", "vermagic="+release+" SMP")
	addModule(t, in, "lib/tsm.ko", "vermagic="+release+" SMP")
	require.NoError(t, os.WriteFile(filepath.Join(in.Modules, "modules.builtin"), []byte("kernel/virtio_blk.ko\nkernel/built-in.ko\n"), 0o600))
	return in
}

func addModule(t *testing.T, in inputs, name string, info ...string) {
	t.Helper()
	path := filepath.Join(in.Modules, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	data := sign(fakeModuleFor(architectures[in.Arch].machine, info...))
	if strings.HasSuffix(name, ".xz") {
		var packed bytes.Buffer
		w, err := xz.NewWriter(&packed)
		require.NoError(t, err)
		_, err = w.Write(data)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		data = packed.Bytes()
	}
	require.NoError(t, os.WriteFile(path, data, 0o644))
}

// files reads an archive; names in the order in which they stand.
func files(t *testing.T, archive []byte) (names []string, content map[string]string) {
	t.Helper()
	content = map[string]string{}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(archive)))
	require.NoError(t, err)
	for _, r := range records {
		require.Zero(t, r.MTime+r.UID+r.GID+r.Dev, r.Name)
		names = append(names, r.Name)
		if r.ReaderAt != nil {
			data, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			require.NoError(t, err)
			content[r.Name] = string(data)
		}
	}
	return names, content
}

func TestImage(t *testing.T) {
	in := fakeInputs(t)
	m, err := build(in)
	require.NoError(t, err)
	archive, err := os.ReadFile(filepath.Join(in.Out, "initrd.img"))
	require.NoError(t, err)
	names, content := files(t, archive)
	require.Equal(t, []string{"dev", "dev/console", "init", "lib", "lib/modules"}, names[:5])
	require.NotContains(t, content, "lib/modules/d.ko", "a module that is only to be loaded after")
	require.Equal(t, string(fakeModule("vermagic="+release+" SMP")), content["lib/modules/c_c.ko"], "unpacked, and without its signature")
	require.Equal(t, strings.Join([]string{
		"early vmw_vsock_virtio_transport.ko",
		"later c_c.ko", "later a.ko", "later b.ko", "later virtio_net.ko",
		"later virtio_scsi.ko", "later sd_mod.ko", "later erofs.ko", "later overlay.ko", "later ext4.ko", "later quota_v2.ko",
		"later tun.ko", "none virtio_balloon.ko", "later pvpanic_pci.ko", "none virtio_mem.ko",
		"confidential dm_mod.ko", "confidential dm_integrity.ko", "confidential dm_crypt.ko",
		"confidential brd.ko rd_nr=1 rd_size=16777216", "confidential xts.ko", "confidential aesni_intel.ko", "confidential sha256_ssse3.ko",
		// Either platform's guest loads what it needs, of which the other's has some too.
		"snp tsm.ko", "snp sev_guest.ko", "tdx tsm.ko", "tdx tdx_guest.ko", "",
	}, "\n"), content["lib/modules/load"])
	require.Equal(t, slices.Sorted(slices.Values(names)), slices.Compact(slices.Sorted(slices.Values(names))), "each file once")

	var read manifest
	text, err := os.ReadFile(filepath.Join(in.Out, "guest.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &read))
	require.Equal(t, *m, read)
	require.Equal(t, release, read.Kernel.Release)
	require.Equal(t, "v1", read.AgentVersion)
	require.Equal(t, digest(archive), read.Initrd.SHA256)
	require.Equal(t, len(archive), read.Initrd.Size)
	require.Equal(t, "amd64", read.Architecture)
	require.Len(t, read.Modules, 26)
	kernel, err := os.ReadFile(filepath.Join(in.Out, "vmlinuz"))
	require.NoError(t, err)
	require.Equal(t, digest(kernel), read.Kernel.SHA256)
	entries, err := os.ReadDir(in.Out)
	require.NoError(t, err)
	require.Len(t, entries, 3, "no temporary file is left")
}

func TestS390X(t *testing.T) {
	in := fakeInputs(t)
	in.Arch = "s390x"
	in.Modules = filepath.Join(t.TempDir(), release)
	for _, w := range architectures["s390x"].wanted() {
		addModule(t, in, "x/"+w.name+".ko.xz", "vermagic="+release+" SMP", "depends=")
	}
	require.NoError(t, os.WriteFile(filepath.Join(in.Modules, "modules.builtin"), nil, 0o600))
	require.NoError(t, os.WriteFile(in.Kernel, fakeS390XKernel(release+" (builder) #1"), 0o600))
	_, err := build(in)
	require.ErrorContains(t, err, "was built for EM_X86_64, the guest is EM_S390", "an agent for the wrong machine")
	require.NoError(t, os.WriteFile(in.Agent, fakeELFFor(elf.EM_S390, ".text", []byte("agent"), elf.PT_LOAD), 0o700))
	m, err := build(in)
	require.NoError(t, err)
	require.Equal(t, "s390x", m.Architecture)
	require.Equal(t, release, m.Kernel.Release)
	archive, err := os.ReadFile(filepath.Join(in.Out, "initrd.img"))
	require.NoError(t, err)
	_, content := files(t, archive)
	require.Equal(t, strings.Join([]string{
		"later crc32c_generic.ko", "early vmw_vsock_virtio_transport.ko", "later virtio_net.ko", "later virtio_scsi.ko", "later sd_mod.ko",
		"later erofs.ko", "later overlay.ko", "later virtio_blk.ko", "later ext4.ko", "later quota_v2.ko",
		"later tun.ko", "none virtio_balloon.ko", "confidential dm_mod.ko", "confidential dm_integrity.ko", "confidential dm_crypt.ko",
		"confidential brd.ko rd_nr=1 rd_size=16777216", "confidential xts.ko", "confidential aes_s390.ko", "confidential sha256_s390.ko",
		"se uvdevice.ko", "",
	}, "\n"), content["lib/modules/load"])

	for name, kernel := range map[string][]byte{
		"not a kernel image for s390x":       fakeKernel(release + " (x)"),
		"names no kernel version":            bytes.Replace(fakeS390XKernel("x"), []byte{0x01, 0x10, 0x00}, []byte{0x41, 0x10, 0x00}, 1),
		"version is not a text":              fakeS390XKernel(""),
		`was built for kernel "6.12.0-test"`: fakeS390XKernel("6.13.0 (x)"),
	} {
		require.NoError(t, os.WriteFile(in.Kernel, kernel, 0o600))
		_, err := build(in)
		require.ErrorContains(t, err, name)
	}
}

func TestReproducible(t *testing.T) {
	for _, compression := range []string{"none", "gzip", "zstd"} {
		var first map[string][]byte
		for round := range 2 {
			in := fakeInputs(t) // in another directory
			in.Compression = compression
			if round == 1 {
				// What must not matter: times, modes, where it is, what was there before.
				old := time.Unix(1e9, 0)
				require.NoError(t, os.Chtimes(in.Agent, old, old))
				require.NoError(t, os.Chmod(in.Agent, 0o755))
				require.NoError(t, os.MkdirAll(in.Out, 0o700))
				require.NoError(t, os.WriteFile(filepath.Join(in.Out, "initrd.img"), []byte("old"), 0o600))
			}
			_, err := build(in)
			require.NoError(t, err)
			got := map[string][]byte{}
			for _, name := range []string{"vmlinuz", "initrd.img", "guest.json"} {
				got[name], err = os.ReadFile(filepath.Join(in.Out, name))
				require.NoError(t, err)
			}
			if round == 0 {
				first = got
			}
			require.Equal(t, first, got, compression)
		}
	}
}

func TestCompressions(t *testing.T) {
	data := bytes.Repeat([]byte("cloister"), 1000)
	packed, err := compress("gzip", data)
	require.NoError(t, err)
	gz, err := gzip.NewReader(bytes.NewReader(packed))
	require.NoError(t, err)
	got, err := io.ReadAll(gz)
	require.NoError(t, err)
	require.Equal(t, data, got)
	packed, err = compress("zstd", data)
	require.NoError(t, err)
	zr, err := zstd.NewReader(bytes.NewReader(packed))
	require.NoError(t, err)
	defer zr.Close()
	got, err = io.ReadAll(zr)
	require.NoError(t, err)
	require.Equal(t, data, got)
	_, err = compress("lzma", data)
	require.ErrorContains(t, err, "lzma")
}

func TestMistakes(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, in *inputs)
		want   string
	}{
		"no kernel":    {func(_ *testing.T, in *inputs) { in.Kernel += "x" }, "read the kernel"},
		"not a kernel": {func(_ *testing.T, in *inputs) { in.Kernel = in.Agent }, "not a bzImage"},
		"other kernel": {replace(func(in *inputs) string { return in.Kernel }, fakeKernel("6.13.0 (x)")), "was built for kernel"},
		"no version":   {replace(func(in *inputs) string { return in.Kernel }, fakeKernel("")), "version"},
		"no agent":     {func(_ *testing.T, in *inputs) { in.Agent += "x" }, "read the agent"},
		"script":       {replace(func(in *inputs) string { return in.Agent }, []byte("#!/bin/sh\n")), "not an executable"},
		"dynamic":      {replace(func(in *inputs) string { return in.Agent }, fakeELF(".text", nil, elf.PT_INTERP)), "dynamically"},
		"no modules":   {func(_ *testing.T, in *inputs) { in.Modules += "x" }, "lib/modules/RELEASE"},
		"missing module": {func(t *testing.T, in *inputs) { require.NoError(t, os.Remove(filepath.Join(in.Modules, "x/erofs.ko"))) },
			"module erofs"},
		"missing need": {func(t *testing.T, in *inputs) { require.NoError(t, os.Remove(filepath.Join(in.Modules, "lib/a.ko"))) },
			"module a (for virtio_net)"},
		"circle": {func(t *testing.T, in *inputs) {
			addModule(t, *in, "lib/c-c.ko", "vermagic="+release+" SMP", "depends=a")
		}, "circle"},
		"twice": {func(t *testing.T, in *inputs) {
			addModule(t, *in, "other/a.ko", "vermagic="+release+" SMP")
		}, "twice"},
		"no modinfo": {func(t *testing.T, in *inputs) {
			require.NoError(t, os.WriteFile(filepath.Join(in.Modules, "lib/a.ko"), fakeELF(".text", nil, 0), 0o600))
		}, "no .modinfo"},
		"architecture": {func(_ *testing.T, in *inputs) { in.Arch = "pdp11" }, `unknown architecture "pdp11": amd64 and s390x are known`},
		"other machine": {func(t *testing.T, in *inputs) {
			require.NoError(t, os.WriteFile(filepath.Join(in.Modules, "lib/a.ko"), fakeModuleFor(elf.EM_S390, "vermagic="+release), 0o600))
		}, "was built for EM_S390"},
		"compression": {func(_ *testing.T, in *inputs) { in.Compression = "lzma" }, "unknown compression"},
	} {
		t.Run(name, func(t *testing.T) {
			in := fakeInputs(t)
			tc.change(t, &in)
			_, err := build(in)
			require.ErrorContains(t, err, tc.want)
			require.NoFileExists(t, filepath.Join(in.Out, "guest.json"))
		})
	}
}

func replace(path func(*inputs) string, data []byte) func(*testing.T, *inputs) {
	return func(t *testing.T, in *inputs) { require.NoError(t, os.WriteFile(path(in), data, 0o600)) }
}

func TestSignatures(t *testing.T) {
	module := fakeModule("vermagic=x")
	got, err := stripSignature(module)
	require.NoError(t, err)
	require.Equal(t, module, got)
	got, err = stripSignature(sign(module))
	require.NoError(t, err)
	require.Equal(t, module, got)
	for _, bad := range []string{"~Module signature appended~\n", strings.Repeat("\xff", 12) + "~Module signature appended~\n"} {
		_, err = stripSignature([]byte(bad))
		require.Error(t, err)
	}
	in := fakeInputs(t)
	in.KeepSignatures = true
	_, err = build(in)
	require.NoError(t, err)
	archive, err := os.ReadFile(filepath.Join(in.Out, "initrd.img"))
	require.NoError(t, err)
	require.Contains(t, string(archive), "~Module signature appended~")
}

func TestFlags(t *testing.T) {
	in := fakeInputs(t)
	args := []string{"-kernel", in.Kernel, "-modules", in.Modules, "-agent", in.Agent, "-out", in.Out, "-version", "v1"}
	require.NoError(t, run(args))
	require.ErrorContains(t, run(args[:8]), "-version is missing")
	require.Error(t, run([]string{"-no-such-flag"}))
}

func FuzzModinfo(f *testing.F) {
	f.Add(fakeModule("vermagic=x y", "depends=a,b", "softdep=pre: c post: d"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = parseModinfo(data)
		_, _ = stripSignature(data)
		_, _ = bzImageRelease(data)
		_, _ = s390xRelease(data)
	})
}
