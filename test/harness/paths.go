// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const modulePath = "github.com/cloister-project/cloister"

// Artifacts are the files that a node is made of: all paths are absolute.
type Artifacts struct {
	// Repository is the directory of Cloister's go.mod.
	Repository string
	// Cache is where tools/setup and tools/conformance keep what they got and built.
	Cache string
	// Conformance holds containerd, ctr, runc, crictl, nerdctl and the CNI plugins.
	Conformance string
	// Bin holds Cloister's own binaries.
	Bin string
	// Kernel and Initrd are the guest's boot files.
	Kernel, Initrd string
	// QEMU, Virtiofsd and MkfsErofs as tools/setup found them. What it was not asked for is empty.
	QEMU, Virtiofsd, MkfsErofs string
	// Busybox is Debian's static busybox.
	Busybox string
	// QEMUS390X emulates s390x; KernelS390X, InitrdS390X and BusyboxS390X are what its guests are made of. Only
	// pods of the handlers for s390x need them, see [Artifacts.CheckS390X].
	QEMUS390X, KernelS390X, InitrdS390X, BusyboxS390X string
}

// Locate finds the artifacts of the repository that the working directory is in. CLOISTER_CACHE, CLOISTER_BIN,
// CLOISTER_GUEST and CLOISTER_GUEST_S390X replace the places of the cache, of Cloister's binaries and of its boot files.
// It fails if tools/setup has not run; whether the single files are there is checked when a node needs them, see
// [Artifacts.Check].
func Locate() (Artifacts, error) {
	repository, err := findRepository()
	if err != nil {
		return Artifacts{}, err
	}
	cache, err := CacheDir()
	if err != nil {
		return Artifacts{}, err
	}
	env, err := readEnv(filepath.Join(cache, "env"))
	if err != nil {
		return Artifacts{}, fmt.Errorf("this machine is not set up (%w): run `make setup`", err)
	}
	bin := envOr("CLOISTER_BIN", filepath.Join(repository, "bin"))
	guest := envOr("CLOISTER_GUEST", filepath.Join(repository, "bin", "guest"))
	guestS390X := envOr("CLOISTER_GUEST_S390X", filepath.Join(repository, "bin", "guest-s390x"))
	return Artifacts{
		Repository:  repository,
		Cache:       cache,
		Conformance: env["CLOISTER_CONFORMANCE_BIN"],
		Bin:         bin,
		Kernel:      filepath.Join(guest, "vmlinuz"),
		Initrd:      filepath.Join(guest, "initrd.img"),
		QEMU:        env["CLOISTER_QEMU"],
		Virtiofsd:   env["CLOISTER_VIRTIOFSD"],
		MkfsErofs:   env["CLOISTER_MKFS_EROFS"],
		Busybox:     "/bin/busybox",

		QEMUS390X:    env["CLOISTER_QEMU_S390X"],
		KernelS390X:  filepath.Join(guestS390X, "vmlinuz"),
		InitrdS390X:  filepath.Join(guestS390X, "initrd.img"),
		BusyboxS390X: env["CLOISTER_S390X_BUSYBOX"],
	}, nil
}

// Shim is the path of Cloister's shim.
func (a Artifacts) Shim() string { return filepath.Join(a.Bin, "containerd-shim-cloister-v2") }

// Check reports every file that is not there and that a node needs which serves some handlers, or all if none is named.
// What pods on emulated s390x need besides is for [Artifacts.CheckS390X].
func (a Artifacts) Check(handlers ...string) error {
	needs := []need{{a.Busybox, "busybox", "make setup"}}
	for _, tool := range Peers(handlers...) {
		needs = append(needs, need{filepath.Join(a.Conformance, tool), tool, "make peers"})
	}
	if serves(handlers, HandlerErofs) {
		needs = append(needs, need{a.MkfsErofs, "mkfs.erofs", "make setup"})
	}
	if servesCloister(handlers) {
		needs = append(needs, need{a.QEMU, "QEMU", "make setup"}, need{a.Shim(), "shim", "make build"},
			need{a.Kernel, "kernel", "make guest"}, need{a.Initrd, "initrd", "make guest"})
	}
	return missing(needs)
}

// Peers are the binaries of tools/conformance that a node runs which serves some handlers, or all if none is named.
func Peers(handlers ...string) []string {
	// Images are imported with ctr.
	peers := []string{"containerd", "ctr", "bridge", "host-local", "loopback", "portmap"}
	if serves(handlers, HandlerRunc) {
		peers = append(peers, "containerd-shim-runc-v2", "runc")
	}
	return peers
}

func serves(handlers []string, handler string) bool {
	return len(handlers) == 0 || slices.Contains(handlers, handler)
}

func servesCloister(handlers []string) bool {
	return len(handlers) == 0 || slices.ContainsFunc(handlers, func(h string) bool { return h != HandlerRunc })
}

// CheckS390X reports every file that pods on emulated s390x need beside what [Artifacts.Check] is for.
func (a Artifacts) CheckS390X() error {
	return missing([]need{
		{a.QEMUS390X, "QEMU for s390x", "make setup"}, {a.BusyboxS390X, "busybox for s390x", "make setup"},
		{a.KernelS390X, "kernel for s390x", "make guest-s390x"}, {a.InitrdS390X, "initrd for s390x", "make guest-s390x"},
	})
}

// need is a file, what it is, and the command that makes it.
type need struct{ path, what, how string }

func missing(needs []need) error {
	var faults []error
	for _, n := range needs {
		if n.path == "" { // tools/setup has not been asked for it
			faults = append(faults, fmt.Errorf("%s: %w: run `%s`", n.what, os.ErrNotExist, n.how))
		} else if _, err := os.Stat(n.path); err != nil {
			faults = append(faults, fmt.Errorf("%w: run `%s`", err, n.how))
		}
	}
	return errors.Join(faults...)
}

// CacheDir is ${CLOISTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloister}, as in tools/setup.
func CacheDir() (string, error) {
	if dir := os.Getenv("CLOISTER_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "cloister"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no place for the cache: set CLOISTER_CACHE: %w", err)
	}
	return filepath.Join(home, ".cache", "cloister"), nil
}

func envOr(key, otherwise string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return otherwise
}

// findRepository walks up from the working directory: `go test` runs in the package's directory.
func findRepository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for start := dir; ; dir = filepath.Dir(dir) {
		data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module "+modulePath+"\n") {
			return dir, nil
		}
		if dir == "/" {
			return "", fmt.Errorf("%s is not inside a clone of %s", start, modulePath)
		}
	}
}

// SetupValue is one of the values that tools/setup wrote, by its key, for example CLOISTER_MODULES.
func SetupValue(key string) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, "env")
	env, err := readEnv(path)
	if err != nil {
		return "", err
	}
	if env[key] == "" {
		return "", fmt.Errorf("%s does not have %s: run `make setup`", path, key)
	}
	return env[key], nil
}

// readEnv reads the KEY='value' lines that tools/setup writes.
func readEnv(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	env := map[string]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		key, value, ok := strings.Cut(lines.Text(), "=")
		if !ok {
			return nil, fmt.Errorf("%s: %q is not KEY='value'", path, lines.Text())
		}
		env[key] = strings.Trim(value, "'")
	}
	return env, lines.Err()
}
