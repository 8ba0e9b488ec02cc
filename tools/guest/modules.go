// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"

	"github.com/cloister-project/cloister/tee/abi"
)

// Phases of loading, as package agent/boot knows them. Modules of a platform's phase, which has the name of the platform
// (package tee), are loaded by guests that are launched on it only, after the early and the later ones; "none" is that of
// ordinary guests.
const (
	phaseEarly = "early"
	phaseLater = "later"
	// phaseConfidential is of guests on any platform but abi.None. A module whose CPU feature is not there does no harm.
	phaseConfidential = "confidential"
	phaseNone         = string(abi.None)
	phaseSNP          = string(abi.SNP)
	phaseTDX          = string(abi.TDX)
	phaseSE           = string(abi.SE)
)

type want struct{ phase, name string }

// wanted lists the modules that the agent needs, in the order in which they are wanted. Early ones stand between the
// kernel's start and the agent's first word to the host; the rest loads while the host answers.
var wanted = []want{
	{phaseEarly, "vmw_vsock_virtio_transport"},
	// Pods' networks are set up first, then come root file systems.
	{phaseLater, "virtio_net"},
	{phaseLater, "virtio_scsi"},
	{phaseLater, "sd_mod"},
	{phaseLater, "erofs"},
	{phaseLater, "overlay"},
	{phaseLater, "virtio_blk"},
	// The scratch disk, and limits on it. Some kernels have ext4 built in.
	{phaseLater, "ext4"},
	{phaseLater, "quota_v2"},
	// For containers that ask for /dev/net/tun.
	{phaseLater, "tun"},
	// Gives memory back to the host. A confidential guest's memory is its own.
	{phaseNone, "virtio_balloon"},
}

// confidential lists what encrypts the scratch disk (agent/storage): the mapping, a disk in memory for the tags, the mode of
// the cipher. AES, SHA-256 and HMAC are built into the kernels; each architecture adds what its CPUs do faster.
var confidential = []want{
	{phaseConfidential, "dm_mod"},
	{phaseConfidential, "dm_integrity"},
	{phaseConfidential, "dm_crypt"},
	{phaseConfidential, "brd"},
	{phaseConfidential, "xts"},
}

// architecture is what differs between the guests' architectures.
type architecture struct {
	machine elf.Machine
	// release reads the kernel's release out of its image.
	release func(image []byte) (string, error)
	// first and last are wanted beside the list above, before and after it.
	first, last []want
}

// wanted is the whole list.
func (a architecture) wanted() []want { return slices.Concat(a.first, wanted, a.last) }

// architectures by Go's names.
var architectures = map[string]architecture{
	"amd64": {elf.EM_X86_64, bzImageRelease, nil, slices.Concat([]want{
		// Tells the VMM of a panic.
		{phaseLater, "pvpanic_pci"},
		// Takes memory that comes while the VM runs.
		{phaseNone, "virtio_mem"},
	}, confidential, []want{
		{phaseConfidential, "aesni_intel"},
		{phaseConfidential, "sha256_ssse3"},
		// The guest's side of attestation; each brings tsm and configfs along, where reports are asked for.
		{phaseSNP, "sev_guest"},
		{phaseTDX, "tdx_guest"},
	})},
	"s390x": {elf.EM_S390, s390xRelease, []want{
		// What libcrc32c, and so erofs, asks the kernel's crypto for by a name that is no module's. amd64 has it built in.
		{phaseLater, "crc32c_generic"},
	}, slices.Concat(confidential, []want{
		{phaseConfidential, "aes_s390"},
		{phaseConfidential, "sha256_s390"},
		// /dev/uv, the ultravisor's interface. The kernel tells the VMM of a panic by itself, through its disabled wait.
		{phaseSE, "uvdevice"},
	})},
}

// parameters that modules are loaded with.
var parameters = map[string]string{
	// Else virtio_scsi's load does not return before all of a controller's 256 targets were asked, which takes longer
	// than everything else the agent does. Package boot has them asked in the background.
	"scsi_mod": "scan=manual",
	// One disk in memory, of 16 GiB at most: it takes what is written to it. Package storage has the tags of the encrypted
	// scratch disk there.
	"brd": "rd_nr=1 rd_size=16777216",
}

// maxModule bounds one unpacked module, bytes.
const maxModule = 64 << 20

// module is a kernel module that goes into the image.
type module struct {
	name  string // as in .modinfo: with _ for every -
	phase string
	// params are given to the kernel at loading; empty for most.
	params string
	data   []byte // unpacked
}

// tree is a lib/modules/RELEASE directory.
type tree struct {
	arch           architecture
	release        string
	keepSignatures bool
	files          map[string]string // module name → path
	builtin        map[string]bool
}

// moduleName turns a file name into the module's name: the kernel knows no difference between - and _.
func moduleName(path string) string {
	base := filepath.Base(path)
	base, _, _ = strings.Cut(base, ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

func openTree(dir, release string, arch architecture) (*tree, error) {
	t := &tree{arch: arch, release: release, files: map[string]string{}, builtin: map[string]bool{}}
	f, err := os.Open(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("-modules must be a lib/modules/RELEASE directory: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		t.builtin[moduleName(lines.Text())] = true
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if strings.HasSuffix(path, ".ko") || strings.HasSuffix(path, ".ko.xz") {
			name := moduleName(path)
			if other, ok := t.files[name]; ok {
				return fmt.Errorf("module %s is there twice: %s and %s", name, other, path)
			}
			t.files[name] = path
		}
		return nil
	})
	return t, err
}

// resolve returns the wanted modules and all that they need, needed ones first: each once, but in each platform's phase
// anew if only another platform's phase has it, since a guest loads one of them at most.
func (t *tree) resolve() ([]module, error) {
	var out []module
	const inProgress, done = 1, 2
	common, state := map[string]int{}, map[string]int{}
	var add func(name, phase, wantedBy string, must bool) error
	add = func(name, phase, wantedBy string, must bool) error {
		if t.builtin[name] || state[name] == done {
			return nil
		}
		if state[name] == inProgress {
			return fmt.Errorf("modules need each other in a circle at %s", name)
		}
		path, ok := t.files[name]
		if !ok {
			if !must {
				return nil // a soft dependency may be an alias, or left out of the build
			}
			return fmt.Errorf("module %s (for %s) is neither in the directory of modules nor built into the kernel", name, wantedBy)
		}
		state[name] = inProgress
		data, info, err := t.read(path)
		if err != nil {
			return err
		}
		for _, d := range info.depends {
			if err := add(d, phase, name, true); err != nil {
				return err
			}
		}
		for _, d := range info.softPre {
			if err := add(d, phase, name, false); err != nil {
				return err
			}
		}
		state[name] = done
		out = append(out, module{name: name, phase: phase, params: parameters[name], data: data})
		return nil
	}
	phase := ""
	for _, w := range t.arch.wanted() {
		switch {
		case w.phase == phaseEarly || w.phase == phaseLater:
			state = common
		case w.phase != phase:
			state = maps.Clone(common)
		}
		phase = w.phase
		if err := add(w.name, w.phase, "the agent", true); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// read unpacks a module, checks that it fits the kernel, and takes off its signature.
func (t *tree) read(path string) ([]byte, modinfo, error) {
	data, err := readModule(path)
	if err != nil {
		return nil, modinfo{}, err
	}
	info, err := parseModinfo(data)
	if err != nil {
		return nil, info, fmt.Errorf("module %s: %w", path, err)
	}
	if info.machine != t.arch.machine {
		return nil, info, fmt.Errorf("module %s was built for %s, the guest is %s", path, info.machine, t.arch.machine)
	}
	if info.release != t.release {
		return nil, info, fmt.Errorf("module %s was built for kernel %q, the kernel is %q", path, info.release, t.release)
	}
	if !t.keepSignatures {
		if data, err = stripSignature(data); err != nil {
			return nil, info, fmt.Errorf("module %s: %w", path, err)
		}
	}
	return data, info, nil
}

func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = bufio.NewReader(f)
	if strings.HasSuffix(path, ".xz") {
		if r, err = xz.NewReader(r); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", path, err)
		}
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", path, err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("module %s has more than %d bytes", path, maxModule)
	}
	return data, nil
}

type modinfo struct {
	machine elf.Machine
	release string // kernel that the module was built for
	depends []string
	softPre []string
}

// stripSignature takes off what scripts/sign-file of Linux appended: signature, struct module_signature, magic text.
//
// Checking it costs the guest 30 to 80 ms a module under emulation and adds nothing: the initrd as a whole is what the
// launch measures, or what the host gave to the VM. The kernel notes the lack as taint E. A kernel locked down by its
// command line (lockdown=, module.sig_enforce) takes only signed modules: -keep-signatures.
func stripSignature(data []byte) ([]byte, error) {
	const (
		magic      = "~Module signature appended~\n"
		headerSize = 12
	)
	rest, found := bytes.CutSuffix(data, []byte(magic))
	if !found {
		return data, nil
	}
	if len(rest) < headerSize {
		return nil, errors.New("its signature is cut off")
	}
	size := uint64(binary.BigEndian.Uint32(rest[len(rest)-4:]))
	rest = rest[:len(rest)-headerSize]
	if size > uint64(len(rest)) {
		return nil, errors.New("its signature is longer than the module")
	}
	return rest[:uint64(len(rest))-size], nil
}

// parseModinfo reads the .modinfo section of a module: NUL-terminated key=value texts.
func parseModinfo(data []byte) (modinfo, error) {
	var info modinfo
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return info, err
	}
	info.machine = file.Machine
	section := file.Section(".modinfo")
	if section == nil {
		return info, errors.New("has no .modinfo section")
	}
	text, err := section.Data()
	if err != nil {
		return info, fmt.Errorf("read .modinfo: %w", err)
	}
	for entry := range bytes.SplitSeq(text, []byte{0}) {
		key, value, found := strings.Cut(string(entry), "=")
		if !found {
			continue
		}
		switch key {
		case "vermagic":
			info.release, _, _ = strings.Cut(value, " ")
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					info.depends = append(info.depends, strings.ReplaceAll(d, "-", "_"))
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				switch {
				case word == "pre:":
					pre = true
				case word == "post:":
					pre = false
				case pre:
					info.softPre = append(info.softPre, strings.ReplaceAll(word, "-", "_"))
				}
			}
		}
	}
	if info.release == "" {
		return info, errors.New("its .modinfo names no kernel (vermagic)")
	}
	return info, nil
}

func sortedByName(in []module) []module {
	out := slices.Clone(in)
	slices.SortFunc(out, func(a, b module) int { return strings.Compare(a.name, b.name) })
	return out
}
