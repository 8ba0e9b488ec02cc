// SPDX-License-Identifier: Apache-2.0

package treetest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NeedRoot skips a test that mounts.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts filesystems")
	}
	if b, _ := os.ReadFile("/proc/filesystems"); !bytes.Contains(b, []byte("\terofs\n")) {
		t.Skip("the kernel has no EROFS")
	}
}

// Mount mounts an EROFS image until the test ends and returns the place.
func Mount(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount(image, dir, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) {
		out, e := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput()
		if err = e; err != nil {
			err = fmt.Errorf("%w: %s", e, out)
		}
	}
	if err != nil {
		t.Fatalf("mount %s: %v", image, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// Overlay mounts lower directories, the top one first, until the test ends.
func Overlay(t testing.TB, lowers ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	return dir
}

// Describe returns one line for each file of a tree: all that a container could see of it.
func Describe(t testing.TB, root string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	inodes := make(map[uint64][]string)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			if errors.Is(err, unix.ENOENT) {
				return nil // overlayfs lists a whiteout in a directory that only one layer has
			}
			return err
		}
		line := fmt.Sprintf("mode=%o uid=%d gid=%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			line += fmt.Sprintf(" size=%d sha256=%x", st.Size, sum(t, f, st.Size))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " target=" + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[st.Ino] = append(inodes[st.Ino], rel)
		}
		out[rel] = line + xattrs(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for ino, names := range inodes {
		sort.Strings(names)
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, names[0]), &st); err != nil {
			t.Fatal(err)
		}
		if st.Ino != ino {
			t.Fatalf("inode of %s changed", names[0])
		}
		for _, n := range names {
			out[n] += fmt.Sprintf(" nlink=%d links=%v", st.Nlink, names)
		}
	}
	return out
}

// sum hashes a file's data and where the long runs of zeros are, without reading terabytes of holes.
func sum(t testing.TB, f *os.File, size int64) []byte {
	t.Helper()
	h := sha256.New()
	buf := make([]byte, min(1<<20, (size+65535)/65536*65536))
	for pos := int64(0); pos < size; {
		start, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			start = pos
		}
		// Whole blocks of 64 KiB that hold something else than zeros count, whatever the filesystem calls a hole.
		pos = start / (64 << 10) * (64 << 10)
		n, err := f.ReadAt(buf, pos)
		if n == 0 {
			t.Fatalf("read %s at %d: %v", f.Name(), pos, err)
		}
		for i := 0; i < n; i += 64 << 10 {
			part := buf[i:min(i+64<<10, n)]
			if len(bytes.Trim(part, "\x00")) > 0 {
				fmt.Fprintf(h, "%d:", pos+int64(i))
				h.Write(part)
			}
		}
		pos += int64(n)
	}
	return h.Sum(nil)[:8]
}

func xattrs(t testing.TB, path string) string {
	t.Helper()
	buf := make([]byte, 8<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return ""
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	line := ""
	for _, name := range names {
		value := make([]byte, 8<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatalf("%s of %s: %v", name, path, err)
		}
		line += fmt.Sprintf(" %s=%x", name, sha256.Sum256(value[:n]))[:len(name)+12]
	}
	return line
}

// Compare reports what differs between two descriptions.
func Compare(t testing.TB, want, got map[string]string) {
	t.Helper()
	differ := 0
	for name, w := range want {
		if g, ok := got[name]; !ok {
			t.Errorf("%s is missing", name)
		} else if g != w {
			t.Errorf("%s:\n want %s\n  got %s", name, w, g)
		} else {
			continue
		}
		if differ++; differ > 20 {
			t.Fatal("too many differences")
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s should not be there", name)
		}
	}
}

// Write makes a file with its parents.
func Write(t testing.TB, path, contents string) {
	t.Helper()
	Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	Must(t, os.WriteFile(path, []byte(contents), 0o644))
}

// Must fails the test on an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Zoo fills dir with a file of every kind that a root filesystem can hold.
func Zoo(t testing.TB, dir string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(dir, name) }
	Write(t, in("etc/passwd"), "root:x:0:0::/:/bin/sh\n")
	Write(t, in("empty"), "")
	for _, size := range []int{1, 2047, 2048, 2049, 4032, 4095, 4096, 4097, 8192, 100000, 1 << 20} {
		Write(t, in(fmt.Sprintf("sizes/%d", size)), strings.Repeat("0123456789abcde\n", size/16+1)[:size])
	}
	Must(t, os.MkdirAll(in("empty-dir"), 0o700))
	Must(t, os.MkdirAll(in("tmp"), 0o755))
	Must(t, unix.Chmod(in("tmp"), 0o1777))
	Write(t, in("bin/su"), "elf")
	Must(t, unix.Chown(in("bin/su"), 0, 1234567))
	Must(t, unix.Chmod(in("bin/su"), 0o6755))
	Write(t, in("big-ids"), "x")
	Must(t, unix.Chown(in("big-ids"), 4000000000, 65536))
	Must(t, unix.Setxattr(in("bin/su"), "security.capability",
		[]byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	Must(t, unix.Setxattr(in("etc/passwd"), "user.note", []byte("hello"), 0))
	Must(t, unix.Setxattr(in("etc/passwd"), "user.empty", nil, 0))
	Must(t, unix.Setxattr(in("etc/passwd"), "trusted.x", bytes.Repeat([]byte{7}, 1000), 0))
	Must(t, unix.Setxattr(in("empty-dir"), "user.dir", []byte{0, 1, 2}, 0))
	// user::rw- user:7:r-- group::r-- mask::r-- other::---, as the kernel encodes it
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
		16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
	Write(t, in("acl"), "a")
	Must(t, unix.Setxattr(in("acl"), "system.posix_acl_access", acl, 0))
	Must(t, unix.Setxattr(in("tmp"), "system.posix_acl_default", acl, 0))
	Must(t, os.Link(in("etc/passwd"), in("etc/passwd-link")))
	Must(t, os.Link(in("etc/passwd"), in("bin/passwd-link")))
	Must(t, os.Symlink("etc/passwd", in("short-link")))
	Must(t, os.Symlink(strings.Repeat("x/", 2047), in("long-link")))
	Must(t, os.Symlink(strings.Repeat("y", 3000), in("middle-link")))
	Must(t, os.Link(in("short-link"), in("short-link-2")))
	Must(t, unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	Must(t, unix.Mknod(in("big-dev"), unix.S_IFBLK|0o640, int(unix.Mkdev(259, 70000))))
	Must(t, unix.Mknod(in("fifo"), unix.S_IFIFO|0o644, 0))
	Must(t, unix.Mknod(in("socket"), unix.S_IFSOCK|0o755, 0))
	Write(t, in("names/"+strings.Repeat("n", 255)), "long name")
	Write(t, in("names/with\nnewline \xff\xfe"), "odd name")
	Write(t, in("names/!before-dots"), "sorts before the dots")
	Write(t, in("names/..."), "three dots")
	for i := range 1200 {
		Must(t, os.Symlink("t", in(fmt.Sprintf("names/entry-%06d-%s", i, strings.Repeat("p", i%60)))))
	}
	sparse, err := os.Create(in("sparse"))
	Must(t, err)
	Must(t, sparse.Truncate(1<<30+123))
	for _, at := range []int64{0, 5000000, 1<<29 + 1, 1<<30 + 100} {
		_, err = sparse.WriteAt([]byte("data in a sparse file"), at)
		Must(t, err)
	}
	Must(t, sparse.Close())
	Must(t, os.WriteFile(in("hole"), nil, 0o600))
	Must(t, os.Truncate(in("hole"), 5<<30))
	deep := dir
	for range 60 {
		deep = filepath.Join(deep, "deep")
	}
	Write(t, filepath.Join(deep, "down"), "here")
	old := time.Date(1965, 1, 2, 3, 4, 5, 678, time.UTC)
	Must(t, os.Chtimes(in("empty"), old, old))
	late := time.Date(2300, 1, 2, 3, 4, 5, 999999999, time.UTC)
	Must(t, os.Chtimes(in("sizes/4096"), late, late))
}
