// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// variant is one of the two programs that are called virtiofsd.
type variant string

const (
	variantC    variant = "c"    // of QEMU, until 7.2
	variantRust variant = "rust" // of gitlab.com/virtio-fs/virtiofsd
)

// features of a virtiofsd, by its own help text, never by its version.
type features struct {
	Variant variant `json:"variant"`
	// AllowMmap: --allow-mmap, which makes mmap work without a cache.
	AllowMmap bool `json:"allow_mmap,omitempty"`
	// AnnounceSubmounts: the option is known.
	AnnounceSubmounts bool `json:"announce_submounts,omitempty"`
	// RlimitNofile: --rlimit-nofile is known.
	RlimitNofile bool `json:"rlimit_nofile,omitempty"`
}

const (
	probeTimeout = 20 * time.Second
	maxHelp      = 64 << 10
)

// probe asks a virtiofsd what it is. The answer is kept in cacheDir, if that is not empty, for as long as the file does not change.
func probe(ctx context.Context, binary, cacheDir string) (features, error) {
	if !filepath.IsAbs(binary) {
		return features{}, fmt.Errorf("virtiofsd %q is not an absolute path: %w", binary, errdefs.ErrInvalidArgument)
	}
	var st unix.Stat_t
	if err := unix.Stat(binary, &st); err != nil {
		return features{}, fmt.Errorf("virtiofsd %s: %w; install virtiofsd (Debian 12: qemu-system-common, Debian 13: virtiofsd) "+
			"or set hypervisor.virtiofsd: %w", binary, err, errdefs.ErrNotFound)
	}
	cache := ""
	if cacheDir != "" {
		id := sha256.Sum256(fmt.Appendf(nil, "1\x00%s\x00%d:%d:%d:%d.%d", binary, st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec))
		cache = filepath.Join(cacheDir, fmt.Sprintf("virtiofsd-%x.json", id[:16]))
		if f, ok := readProbe(cache); ok {
			return f, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--help").CombinedOutput()
	if err != nil && len(out) == 0 {
		return features{}, fmt.Errorf("run %s --help: %w: %w", binary, err, errdefs.ErrFailedPrecondition)
	}
	f, err := parseHelp(string(out[:min(len(out), maxHelp)]))
	if err != nil {
		return features{}, fmt.Errorf("%s: %w", binary, err)
	}
	if cache != "" {
		if err := writeProbe(cache, f); err != nil {
			log.G(ctx).WithError(err).Debug("keep what is known of virtiofsd")
		}
	}
	return f, nil
}

// Shortcoming says what a virtiofsd cannot do that containers expect, and what to do about it; empty if there is nothing. binary is an
// absolute path. Errors: those of Start.
func Shortcoming(ctx context.Context, binary string) (string, error) {
	f, err := probe(ctx, binary, "")
	if err != nil {
		return "", err
	}
	return f.shortcoming(), nil
}

func (f features) shortcoming() string {
	if f.Variant == variantC {
		return "it is the one of QEMU 7 in C, which does not know supplementary groups: where a process may create files by one of them " +
			"alone (fsGroup), it is told \"Permission denied\"; install the one in Rust (Debian 13: virtiofsd) or set hypervisor.virtiofsd to it"
	}
	return ""
}

func parseHelp(help string) (features, error) {
	has := func(s string) bool { return strings.Contains(help, s) }
	f := features{
		AllowMmap:         has("--allow-mmap"),
		AnnounceSubmounts: has("announce_submounts") || has("--announce-submounts"),
		RlimitNofile:      has("--rlimit-nofile"),
	}
	switch {
	case has("--shared-dir") && has("--sandbox") && has("--fd"):
		f.Variant = variantRust
	case has("-o source=") && has("-o sandbox=") && has("--fd="):
		f.Variant = variantC
	default:
		return features{}, fmt.Errorf("its help text names neither --shared-dir nor -o source=, so it is no virtiofsd that is known; "+
			"set hypervisor.virtiofsd to one: %w (%.200q)", errdefs.ErrFailedPrecondition, help)
	}
	return f, nil
}

func readProbe(path string) (f features, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil || len(b) > 4096 || json.Unmarshal(b, &f) != nil {
		return features{}, false
	}
	return f, f.Variant == variantC || f.Variant == variantRust
}

func writeProbe(path string, f features) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".virtiofsd-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
	}
	return err
}

// arguments of a virtiofsd that serves dir on the listening socket that is its file descriptor fd.
//
// Caching is chosen so that changes made on the host show at once. The C program revalidates names and attributes on each use
// (timeout=0) and drops pages whose file has changed, which the guest checks on each read; its cache=none would take mmap away.
// The Rust program has no such timeout, but can do without a cache and still map (--allow-mmap, guest kernels since 6.6).
func (f features) arguments(dir string, fd int, nofile uint64) []string {
	var args []string
	switch f.Variant {
	case variantC:
		options := "source=" + dir + ",sandbox=namespace,cache=auto,timeout=0,xattr,log_level=warn"
		if f.AnnounceSubmounts {
			options += ",announce_submounts"
		}
		args = []string{"-f", fmt.Sprintf("--fd=%d", fd), "-o", options}
	case variantRust:
		args = []string{fmt.Sprintf("--fd=%d", fd), "--shared-dir=" + dir, "--sandbox=namespace", "--xattr", "--log-level=warn"}
		if f.AllowMmap {
			args = append(args, "--cache=never", "--allow-mmap")
		} else {
			args = append(args, "--cache=auto")
		}
		if f.AnnounceSubmounts {
			args = append(args, "--announce-submounts")
		}
	}
	if f.RlimitNofile && nofile > 0 {
		args = append(args, fmt.Sprintf("--rlimit-nofile=%d", nofile))
	}
	return args
}

// maxFiles is how many files virtiofsd may have open: it keeps one for each file that the guest knows of. The hard limit can be
// had without privilege; beyond a million or the system's own limit both programs refuse to start.
func maxFiles() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	most := min(limit.Max, 1_000_000)
	if b, err := os.ReadFile("/proc/sys/fs/file-max"); err == nil {
		var system uint64
		if _, err := fmt.Sscan(string(b), &system); err == nil && system > 32768 {
			most = min(most, system-16384)
		}
	}
	return most
}
