// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ErrNeedsMerge says that a directory cannot be a layer of its own: it refers to the layers below it by marks that only the
// kernel that made them understands (redirected or metadata-only copies).
var ErrNeedsMerge = errors.New("the directory refers to the layers below it")

const (
	trustedOverlay = "trusted.overlay."
	userOverlay    = "user.overlay."
	opaque         = trustedOverlay + "opaque"
)

// xattrs reads and encodes the attributes of the file name in the working directory. Nil means that there are none.
func (s *scanner) xattrs(name string) ([]byte, error) {
	list, err := fetch(func(b []byte) (int, error) { return unix.Llistxattr(name, b) })
	if err != nil || len(list) == 0 {
		return nil, err
	}
	names := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00")
	sort.Strings(names)
	body := make([]byte, xattrHeaderSize)
	binary.LittleEndian.PutUint32(body, 0xFFFFFFFF) // h_name_filter: not in use
	for _, attr := range names {
		stored, err := s.keepXattr(name, attr)
		if err != nil {
			return nil, err
		}
		if stored == "" {
			continue
		}
		index, suffix, ok := splitXattr(stored)
		if !ok {
			continue // private to the host's filesystem (btrfs.compression and the like): EROFS has no name for it
		}
		value, err := fetch(func(b []byte) (int, error) { return unix.Lgetxattr(name, attr, b) })
		if err != nil {
			return nil, fmt.Errorf("%s: %w", attr, err)
		}
		body = append(body, byte(len(suffix)), index, 0, 0)
		binary.LittleEndian.PutUint16(body[len(body)-2:], uint16(len(value)))
		body = append(append(body, suffix...), value...)
		for len(body)%xattrEntrySize != 0 {
			body = append(body, 0)
		}
		if len(body) > maxXattrBody || len(value) > 0xFFFF || len(suffix) > 0xFF {
			return nil, fmt.Errorf("%s is too large: %w", attr, errdefs.ErrResourceExhausted)
		}
	}
	if len(body) == xattrHeaderSize {
		return nil, nil
	}
	return body, nil
}

// keepXattr returns the name under which an attribute is stored, or "" if it is left out.
func (s *scanner) keepXattr(file, attr string) (string, error) {
	if attr == "security.selinux" {
		return "", nil // a label of the host's policy means nothing in the guest
	}
	private := trustedOverlay
	if s.opts.UserXattr {
		private = userOverlay
	}
	if !strings.HasPrefix(attr, private) {
		if strings.HasPrefix(attr, trustedOverlay) {
			return "", nil // would be taken for a mark of the guest's overlay
		}
		return attr, nil
	}
	if !s.opts.KeepOverlay {
		return "", nil
	}
	switch strings.TrimPrefix(attr, private) {
	case "opaque":
		v, err := fetch(func(b []byte) (int, error) { return unix.Lgetxattr(file, attr, b) })
		if err != nil {
			return "", err
		}
		if !bytes.Equal(v, []byte("y")) {
			return "", fmt.Errorf("%s=%q: %w", attr, v, ErrNeedsMerge)
		}
		return opaque, nil
	case "redirect", "metacopy", "whiteout":
		return "", fmt.Errorf("%s: %w", attr, ErrNeedsMerge)
	}
	return "", nil // origin, impure, nlink, uuid, …: about the host's inodes
}

func splitXattr(name string) (index byte, suffix string, ok bool) {
	for _, p := range xattrPrefixes {
		if rest, found := strings.CutPrefix(name, p.prefix); found && (!p.exact || rest == "") {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// fetch calls a system call that fills a buffer of a size that is not known, until the buffer is large enough.
func fetch(call func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := call(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.ERANGE) && len(buf) < 128<<10:
			buf = make([]byte, 4*len(buf))
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODATA):
			return nil, nil
		default:
			return nil, err
		}
	}
}
