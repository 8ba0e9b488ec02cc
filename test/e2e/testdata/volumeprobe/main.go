// SPDX-License-Identifier: Apache-2.0

// Command volumeprobe does in a container what busybox has no words for, in the directory of a volume:
//
//	volumeprobe lock FILE           takes an exclusive flock and fcntl lock, prints "locked" or "busy", and holds them until stdin ends
//	volumeprobe listen SOCKET       answers each connection to a unix socket with "hello"
//	volumeprobe dial SOCKET         prints what it is answered
//	volumeprobe watch DIR           prints "watching", then "changed" at the first inotify event for ..data, and ends
//	volumeprobe write FILE MIB      writes so many MiB, or prints the error
//	volumeprobe permissions DIR     does there what permissions decide about, and prints what became of each
//	volumeprobe cold FILE           prints the SHA-256 of a file as its disk has it, not the page cache, or the error
//	volumeprobe time FILE MIB       prints how many MB/s a file is written with, and read with from its disk
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(what string, args []string) error {
	switch what {
	case "lock":
		return lock(args[0])
	case "listen":
		return listen(args[0])
	case "dial":
		conn, err := net.Dial("unix", args[0])
		if err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, conn)
		return err
	case "watch":
		return watch(args[0])
	case "write":
		return write(args[0], args[1])
	case "permissions":
		return permissions(args[0])
	case "cold":
		return cold(args[0])
	case "time":
		return measure(args[0], args[1])
	}
	return fmt.Errorf("unknown: %s", what)
}

func lock(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	flock := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	fcntl := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if flock != nil || fcntl != nil {
		return fmt.Errorf("busy: %v, %v", flock, fcntl)
	}
	fmt.Println("locked")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o777); err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		_, _ = conn.Write([]byte("hello\n"))
		_ = conn.Close()
	}
}

func watch(dir string) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	if err := w.Add(dir); err != nil {
		return err
	}
	fmt.Println("watching")
	for {
		select {
		case e := <-w.Events:
			if filepath.Base(e.Name) == "..data" && e.Has(fsnotify.Create) {
				fmt.Println("changed")
				return nil
			}
		case err := <-w.Errors:
			return err
		}
	}
}

func write(path, mib string) error {
	n, err := strconv.Atoi(mib)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7)
	}
	for range n {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return f.Close()
}

// uncache writes back what is dirty of a file and drops it from the page cache.
func uncache(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func cold(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := uncache(f); err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	fmt.Printf("%x\n", sum.Sum(nil))
	return nil
}

func measure(path, mib string) error {
	began := time.Now()
	if err := write(path, mib); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := uncache(f); err != nil {
		return err
	}
	written := time.Now()
	size, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	if err != nil {
		return err
	}
	speed := func(d time.Duration) float64 { return float64(size) / 1e6 / d.Seconds() }
	fmt.Printf("write %.1f read %.1f\n", speed(written.Sub(began)), speed(time.Since(written)))
	return nil
}
