// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
)

// Features is what a QEMU binary can do, as far as it matters here.
type Features struct {
	// Version is for people; nothing is decided by it.
	Version string `json:"version"`
	// Machine is the concrete type behind q35, pc-q35-10.0 for example; empty if there is none.
	Machine string `json:"machine"`
	// MachineOptions are those of machineOff that the machine has.
	MachineOptions []string `json:"machine_options"`
	// Types are those of wantedTypes that the binary has.
	Types []string `json:"types"`
	// Sandbox: it was built with seccomp.
	Sandbox bool `json:"sandbox"`
	// ExitWithParent: -run-with exit-with-parent exists.
	ExitWithParent bool `json:"exit_with_parent"`
}

// wantedTypes are the QOM types that command lines use, and accelerators.
var wantedTypes = [...]string{
	"kvm-accel", "tcg-accel", "memory-backend-memfd", "pcie-root-port", "scsi-hd", "vhost-user-fs-pci",
	"vhost-user-vsock-pci", "vhost-vsock-pci", "virtio-net-pci", "virtio-scsi-pci",
}

const (
	featuresVersion = 1
	featuresPrefix  = "qemu-features-"
	maxFeaturesFile = 64 << 10
	probeTimeout    = 30 * time.Second
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

// candidates are the binaries looked for where none is configured: Debian's and Fedora's names.
var candidates = [...]string{"/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"}

// findBinary returns the path of the QEMU to use.
func findBinary(configured string) (string, error) {
	if configured != "" {
		switch fi, err := os.Stat(configured); {
		case err != nil:
			return "", fmt.Errorf("the configured QEMU cannot be used: %w; install it or correct hypervisor.path", err)
		case !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0:
			return "", fmt.Errorf("the configured QEMU %s is no executable file; correct hypervisor.path: %w", configured, errdefs.ErrInvalidArgument)
		}
		return configured, nil
	}
	for _, c := range candidates {
		if fi, err := os.Stat(c); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return c, nil
		}
	}
	if p, err := exec.LookPath("qemu-system-x86_64"); err == nil {
		return p, nil
	}
	return "", fmt.Errorf("no QEMU found at %v or in PATH; install qemu-system-x86 or set hypervisor.path: %w", candidates, errdefs.ErrNotFound)
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
	p, err := startProcess(processSpec{
		path: path,
		args: []string{"-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
			"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", firstInheritedFD), "-mon", "chardev=qmp,mode=control"},
		files:  []*os.File{theirs},
		output: stderr,
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
		b, _ := io.ReadAll(io.LimitReader(output, quotedSize))
		_, _ = io.Copy(io.Discard, output)
		said <- string((&cleaner{}).filter(b))
	}()
	defer func() {
		_ = p.kill()
		<-p.done
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
		return f, fmt.Errorf("%w (is it a QEMU for x86-64?)", err)
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

	var machines []struct{ Name, Alias string }
	if err := c.Execute(ctx, "query-machines", nil, &machines); err != nil {
		return f, err
	}
	for _, m := range machines {
		if m.Alias == "q35" || (m.Name == "q35" && f.Machine == "") {
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

// hasParameter tells whether a command-line option exists and has a parameter.
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
