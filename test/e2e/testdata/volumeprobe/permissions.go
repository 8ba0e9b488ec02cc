// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// permissions uses a directory that has been prepared by its test, which compares the output with that of the same on the host.
func permissions(dir string) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	say := func(what string, err error) {
		var st unix.Stat_t
		if err == nil && unix.Lstat(at(what), &st) == nil {
			fmt.Printf("%s: %o, owner %d:%d\n", what, st.Mode, st.Uid, st.Gid)
			return
		}
		fmt.Printf("%s: %v\n", what, err)
	}
	create := func(name string) error {
		fd, err := unix.Open(at(name), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o666)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	open := func(name string, flags int) error {
		fd, err := unix.Open(at(name), flags, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	unix.Umask(0o027)
	say("file", create("file"))
	say("directory", unix.Mkdir(at("directory"), 0o777))
	say("directory/file", create("directory/file"))
	say("link", unix.Symlink("file", at("link")))
	say("fifo", unix.Mkfifo(at("fifo"), 0o666))
	say("temporary", temporary(dir, at("temporary")))
	say("closed/file", create("closed/file"))

	say("hard link", unix.Link(at("file"), at("hard")))
	say("rename", unix.Rename(at("hard"), at("renamed")))
	say("chmod", unix.Chmod(at("file"), 0o2755))
	say("file", nil)
	say("chown to a group of the caller's", unix.Chown(at("file"), -1, 2000))
	say("file", nil)
	say("chown to another group", unix.Chown(at("file"), -1, 3000))
	say("chown to another user", unix.Chown(at("file"), 0, -1))
	say("xattr", unix.Setxattr(at("file"), "user.note", []byte("hello"), 0))
	say("trusted xattr", unix.Setxattr(at("file"), "trusted.note", []byte("hello"), 0))
	value := make([]byte, 256)
	n, err := unix.Getxattr(at("file"), "user.note", value)
	fmt.Printf("xattr: %q %v\n", value[:max(n, 0)], err)
	say("read by the group", open("theirs", unix.O_RDONLY))
	say("write by the group", open("theirs", unix.O_WRONLY))
	say("remove in a sticky directory", unix.Unlink(at("sticky/theirs")))
	say("remove one's own there", createAndRemove(at("sticky/ours")))
	say("truncate a set-user-ID file", unix.Truncate(at("setuid"), 0))
	say("setuid", nil)

	fmt.Println("acl: set:", unix.Setxattr(at("file"), "system.posix_acl_access", acl(3000), 0))
	_, err = unix.Getxattr(at("acl"), "system.posix_acl_default", value)
	fmt.Println("acl: get:", err)
	return nil
}

// temporary makes a file without a name and gives it one.
func temporary(dir, name string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o640)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		return err
	}
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
}

func createAndRemove(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_ = f.Close()
	return unix.Unlink(path)
}

// acl is an access control list that lets one more user read and write (linux/posix_acl_xattr.h).
func acl(user uint32) []byte {
	const (
		version                          = 2
		owner, named, group, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
		nobody                           = 1<<32 - 1
	)
	b := binary.LittleEndian.AppendUint32(nil, version)
	for _, e := range []struct {
		tag, permissions uint16
		id               uint32
	}{{owner, 7, nobody}, {named, 6, user}, {group, 5, nobody}, {mask, 7, nobody}, {other, 0, nobody}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.permissions)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}
