// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pipeBytes is the size wanted for output FIFOs: a burst gets through with fewer switches between shim and reader. The
// kernel takes pages for it only when they are filled.
const pipeBytes = 256 << 10

// target is a parsed stdio field of a request.
type target struct {
	scheme string // "fifo" (any path), "file" or "binary", "binary-v2"
	path   string
	args   []string
	raw    string
}

// parseTarget reads what containerd puts into the stdin, stdout and stderr fields.
func parseTarget(raw string) (target, error) {
	if strings.HasPrefix(raw, "/") {
		return target{scheme: "fifo", path: raw, raw: raw}, nil
	}
	u, err := url.Parse(raw)
	if err != nil {
		return target{}, fmt.Errorf("stdio %.200q: %w: %w", raw, err, errdefs.ErrInvalidArgument)
	}
	t := target{scheme: u.Scheme, path: u.Path, raw: raw}
	switch u.Scheme {
	case "fifo", "file":
	case "binary", "binary-v2":
		if t.args, err = loggerArgs(u.RawQuery); err != nil {
			return target{}, fmt.Errorf("stdio %.200q: %w: %w", raw, err, errdefs.ErrInvalidArgument)
		}
	case "ttrpc+unix", "ttrpc+vsock", "ttrpc+hvsock", "grpc+unix", "grpc+vsock", "grpc+hvsock":
		return target{}, fmt.Errorf("stdio %.200q: streaming I/O is not implemented; set io_type = \"fifo\" for the runtime in containerd's "+
			"configuration: %w",
			raw, errdefs.ErrNotImplemented)
	default:
		return target{}, fmt.Errorf("stdio %.200q has an unknown scheme, want a FIFO's path, file://, binary:// or binary-v2://: %w",
			raw, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(t.path) {
		return target{}, fmt.Errorf("stdio %.200q has no absolute path: %w", raw, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// loggerArgs makes the arguments of a logging program as containerd does (cmd/containerd-shim-runc-v2/process:
// NewBinaryCmd), but keeps the order of the query: "key" or "key=value" becomes key [value].
func loggerArgs(query string) ([]string, error) {
	var args []string
	for part := range strings.SplitSeq(query, "&") {
		if part == "" {
			continue
		}
		k, v, _ := strings.Cut(part, "=")
		for _, s := range []string{k, v} {
			a, err := url.QueryUnescape(s)
			if err != nil {
				return nil, err
			}
			args = append(args, a)
		}
	}
	return args, nil
}

// openOutput opens a path for a process's output.
func openOutput(t target) (*os.File, error) {
	if t.scheme == "file" {
		if err := os.MkdirAll(filepath.Dir(t.path), 0o755); err != nil {
			return nil, err
		}
		return os.OpenFile(t.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	}
	f, isFIFO, err := openFIFO(t.path)
	if err != nil || isFIFO {
		if isFIFO {
			// Best effort: a node may limit the size of pipes.
			if raw, err := f.SyscallConn(); err == nil {
				_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeBytes) })
			}
		}
		return f, err
	}
	return os.OpenFile(t.path, os.O_WRONLY|os.O_APPEND|unix.O_NOCTTY, 0)
}

// openFIFO opens path for reading and writing if it is a FIFO. It never blocks. For anything else it gives no file.
func openFIFO(path string) (*os.File, bool, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, false, kind(err)
	}
	if st.Mode().Type() != fs.ModeNamedPipe {
		return nil, false, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, false, kind(err)
	}
	// What was looked at need not be what was opened.
	if st, err := f.Stat(); err != nil || st.Mode().Type() != fs.ModeNamedPipe {
		_ = f.Close()
		return nil, false, fmt.Errorf("%s was replaced while it was opened: %w", path, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	return f, true, nil
}

func kind(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}
