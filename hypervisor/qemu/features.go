// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// Features is what a QEMU binary can do, as far as it matters here.
type Features struct {
	// Version is for people; nothing is decided by it.
	Version string `json:"version"`
	// Architecture of the guests that it runs; QEMU's own word if Cloister does not know it.
	Architecture hypervisor.Architecture `json:"architecture"`
	// Machine is the concrete type behind q35 or s390-ccw-virtio, pc-q35-10.0 for example; empty if there is none.
	Machine string `json:"machine"`
	// MachineOptions are those of machineOff that the machine has.
	MachineOptions []string `json:"machine_options"`
	// Types are those of wantedTypes that the binary has.
	Types []string `json:"types"`
	// Objects are the properties of the confidential platforms' objects, as the binary's QMP schema lists them. An object
	// whose type is not in Types cannot be made all the same.
	Objects map[string][]string `json:"objects"`
	// Sandbox: it was built with seccomp.
	Sandbox bool `json:"sandbox"`
	// ExitWithParent: -run-with exit-with-parent exists.
	ExitWithParent bool `json:"exit_with_parent"`
}

// has reports whether the binary has a type of wantedTypes.
func (f Features) has(t string) bool { return slices.Contains(f.Types, t) }

// wantedTypes are the QOM types that command lines use, and accelerators.
var wantedTypes = [...]string{
	"kvm-accel", "tcg-accel", "memory-backend-memfd", "pcie-root-port", "scsi-hd", "vhost-user-fs-pci",
	"vhost-user-vsock-pci", "vhost-vsock-pci", "virtio-balloon-pci", "virtio-mem-pci", "virtio-net-pci", "virtio-scsi-pci",
	"sclpconsole", "vhost-vsock-ccw", "virtio-balloon-ccw", "virtio-net-ccw", "virtio-scsi-ccw", "zpci",
	typeMonitor, typeSNP, typeTDX, typeSE,
}

const (
	featuresVersion = 3
	featuresPrefix  = "qemu-features-"
	maxFeaturesFile = 64 << 10
	probeTimeout    = 30 * time.Second
	maxComplaint    = 4 << 10 // bytes that are quoted of what a binary says of itself
)

// binaryIdentity is what a cached probe result belongs to.
type binaryIdentity struct {
	Path  string `json:"path"`
	Dev   uint64 `json:"dev"`
	Ino   uint64 `json:"ino"`
	Size  int64  `json:"size"`
	Mtime int64  `json:"mtime_ns"`
	Ctime int64  `json:"ctime_ns"`
}

type cachedFeatures struct {
	Version  int            `json:"cache_version"`
	Binary   binaryIdentity `json:"binary"`
	Features Features       `json:"features"`
}

// candidates are the binaries looked for where none is configured: Debian's and Fedora's names. Fedora's qemu-kvm is
// for the host's architecture.
func candidates(arch hypervisor.Architecture) []string {
	name := "qemu-system-" + qemuTarget[arch]
	list := []string{"/usr/bin/" + name, "/usr/local/bin/" + name, "/usr/libexec/" + name}
	if arch == hostArchitecture() {
		list = append(list, "/usr/libexec/qemu-kvm")
	}
	return list
}

// debianPackage of each architecture's QEMU.
var debianPackage = map[hypervisor.Architecture]string{
	hypervisor.ArchAMD64: "qemu-system-x86",
	hypervisor.ArchS390X: "qemu-system-s390x (of Debian 12 qemu-system-misc)",
}

// findBinary returns the path of the QEMU to use.
func findBinary(configured string, arch hypervisor.Architecture) (string, error) {
	if configured != "" {
		switch fi, err := os.Stat(configured); {
		case err != nil:
			return "", fmt.Errorf("the configured QEMU cannot be used: %w; install QEMU, Debian's package %s, or correct hypervisor.path", err,
				debianPackage[arch])
		case !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0:
			return "", fmt.Errorf("the configured QEMU %s is no executable file; correct hypervisor.path: %w", configured,
				errdefs.ErrInvalidArgument)
		}
		return configured, nil
	}
	if qemuTarget[arch] == "" {
		return "", fmt.Errorf("guests of the architecture %q are not supported (amd64 and s390x are); set hypervisor.arch: %w", arch,
			errdefs.ErrNotImplemented)
	}
	// exec.LookPath refuses what it found relative to the working directory; the shim's is the bundle.
	if p, err := exec.LookPath("qemu-system-" + qemuTarget[arch]); err == nil && filepath.IsAbs(p) {
		return p, nil
	}
	for _, c := range candidates(arch) {
		if fi, err := os.Stat(c); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return c, nil
		}
	}
	return "", fmt.Errorf("no QEMU for %s found at %v or in PATH; install Debian's package %s or set hypervisor.path: %w",
		arch, candidates(arch), debianPackage[arch], errdefs.ErrNotFound)
}

func identifyBinary(path string) (binaryIdentity, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return binaryIdentity{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return binaryIdentity{}, fmt.Errorf("stat %s: %w", path, errdefs.ErrNotImplemented)
	}
	return binaryIdentity{Path: path, Dev: st.Dev, Ino: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}, nil
}

// featuresOf returns the cached features of a binary, or probes it. cacheDir may be empty.
func featuresOf(ctx context.Context, path, cacheDir string) (Features, error) {
	id, err := identifyBinary(path)
	if err != nil {
		return Features{}, fmt.Errorf("QEMU: %w", err)
	}
	file := ""
	if cacheDir != "" {
		sum := sha256.Sum256([]byte(path))
		file = filepath.Join(cacheDir, fmt.Sprintf("%s%x", featuresPrefix, sum[:8]))
		if f, ok := readFeatures(file, id); ok {
			return f, nil
		}
	}
	f, err := probe(ctx, path)
	if err != nil {
		return Features{}, fmt.Errorf("ask %s what it can do: %w", path, err)
	}
	if file != "" {
		if err := writeFeatures(file, cachedFeatures{Version: featuresVersion, Binary: id, Features: f}); err != nil {
			// Only the next start is slower.
			log.G(ctx).WithError(err).Warn("cannot cache the features of QEMU")
		}
	}
	return f, nil
}

func readFeatures(file string, id binaryIdentity) (Features, bool) {
	r, err := os.Open(file)
	if err != nil {
		return Features{}, false
	}
	defer r.Close()
	var c cachedFeatures
	if err := json.NewDecoder(io.LimitReader(r, maxFeaturesFile)).Decode(&c); err != nil || c.Version != featuresVersion || c.Binary != id {
		return Features{}, false
	}
	return c.Features, true
}

func writeFeatures(file string, c cachedFeatures) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+featuresPrefix)
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// probe starts the binary without a machine and asks it over QMP.
func probe(ctx context.Context, path string) (f Features, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer for %v: %w", probeTimeout, context.DeadlineExceeded))
	defer cancel()
	conn, theirs, err := socketPair("qmp")
	if err != nil {
		return f, err
	}
	output, stderr, err := os.Pipe()
	if err != nil {
		conn.Close()
		theirs.Close()
		return f, err
	}
	p, err := supervise.Start(supervise.Command{
		Name: "QEMU",
		Path: path,
		Args: []string{"-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
			"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", supervise.FirstInheritedFD), "-mon", "chardev=qmp,mode=control"},
		Files:  []*os.File{theirs},
		Stdout: stderr, Stderr: stderr,
	})
	theirs.Close()
	stderr.Close()
	if err != nil {
		conn.Close()
		output.Close()
		return f, err
	}
	said := make(chan string, 1)
	go func() {
		// Enough for its complaint; the rest is read so that it does not block.
		b, _ := io.ReadAll(io.LimitReader(output, maxComplaint))
		_, _ = io.Copy(io.Discard, output)
		said <- supervise.Clean(string(b))
	}()
	defer func() {
		_ = p.Kill()
		<-p.Done()
		// Whoever else has the write end (a wrapper script's child) is not waited for.
		_ = output.SetReadDeadline(time.Now().Add(time.Second))
		words := <-said
		output.Close()
		if err != nil && words != "" {
			err = fmt.Errorf("%w; it said: %s", err, words)
		}
	}()
	client, err := qmp.New(ctx, conn, nil)
	if err != nil {
		return f, fmt.Errorf("%w (is it a QEMU?)", err)
	}
	defer func() {
		client.Close()
		<-client.Done()
	}()
	return ask(ctx, client)
}

// ask collects the features of a QEMU.
func ask(ctx context.Context, c *qmp.Client) (Features, error) {
	var f Features
	var version struct {
		QEMU    struct{ Major, Minor, Micro int }
		Package string
	}
	if err := c.Execute(ctx, "query-version", nil, &version); err != nil {
		return f, err
	}
	f.Version = fmt.Sprintf("%d.%d.%d %s", version.QEMU.Major, version.QEMU.Minor, version.QEMU.Micro, version.Package)

	var target struct{ Arch string }
	if err := c.Execute(ctx, "query-target", nil, &target); err != nil {
		return f, err
	}
	f.Architecture = hypervisor.Architecture(target.Arch)
	for arch, name := range qemuTarget {
		if name == target.Arch {
			f.Architecture = arch
		}
	}

	var types []struct{ Name string }
	if err := c.Execute(ctx, "qom-list-types", map[string]any{"abstract": false}, &types); err != nil {
		return f, err
	}
	for _, t := range types {
		if slices.Contains(wantedTypes[:], t.Name) {
			f.Types = append(f.Types, t.Name)
		}
	}
	slices.Sort(f.Types)
	known, err := querySchema(ctx, c)
	if err != nil {
		return f, err
	}
	f.Objects = make(map[string][]string)
	for _, kind := range []string{typeSNP, typeTDX} {
		if props := known.object(kind); props != nil {
			f.Objects[kind] = slices.Sorted(maps.Keys(props))
		}
	}

	var machines []struct{ Name, Alias string }
	if err := c.Execute(ctx, "query-machines", nil, &machines); err != nil {
		return f, err
	}
	for _, m := range machines {
		if want := machineAlias[f.Architecture]; want != "" && (m.Alias == want || (m.Name == want && f.Machine == "")) {
			f.Machine = m.Name
		}
	}
	if f.Machine != "" {
		var props []struct{ Name string }
		if err := c.Execute(ctx, "qom-list-properties", map[string]any{"typename": f.Machine + "-machine"}, &props); err != nil {
			return f, err
		}
		for _, off := range machineOff {
			if slices.ContainsFunc(props, func(p struct{ Name string }) bool { return p.Name == off }) {
				f.MachineOptions = append(f.MachineOptions, off)
			}
		}
	}
	for option, set := range map[string]*bool{"sandbox/elevateprivileges": &f.Sandbox, "run-with/exit-with-parent": &f.ExitWithParent} {
		name, parameter := filepath.Split(option)
		has, err := hasParameter(ctx, c, name[:len(name)-1], parameter)
		if err != nil {
			return f, err
		}
		*set = has
	}
	return f, nil
}

// hasParameter reports whether a command-line option exists and has a parameter.
func hasParameter(ctx context.Context, c *qmp.Client, option, parameter string) (bool, error) {
	var options []struct {
		Parameters []struct{ Name string }
	}
	err := c.Execute(ctx, "query-command-line-options", map[string]any{"option": option}, &options)
	var refused *qmp.Error
	if errors.As(err, &refused) {
		return false, nil // an option that it does not know is an error
	}
	if err != nil {
		return false, err
	}
	for _, o := range options {
		for _, p := range o.Parameters {
			if p.Name == parameter {
				return true, nil
			}
		}
	}
	return false, nil
}
