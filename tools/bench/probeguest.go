// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// probePort is where the probe listens. Each connection carries one command, a line:
//
//	source N      the probe writes N bytes and ends the stream
//	sink          it reads to the end, then answers with the number of bytes (8 bytes, little endian)
//	echo          it sends messages of messageSize bytes back until the stream ends
//	read AT N     it reads N bytes of the disk from there on and answers with the nanoseconds that the second half took (likewise)
//
// and an answer that begins with "error" otherwise.
const probePort = 5000

// probeBuffer is the size of one read or write, that of the relays between process and stream.
const probeBuffer = 64 << 10

// messageSize is that of the small messages whose round trip is timed, in bytes.
const messageSize = 64

const probeDisk = "/dev/sda"

// probeMain is the probe's init. The guest is thrown away: nothing here is tidied up.
func probeMain() {
	err := probeServe()
	fmt.Println("probe: cannot go on:", err)
	os.Exit(1) // the kernel panics, and the VM ends
}

func probeServe() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	if err := probeModules(); err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, probePort, nil)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			if err := probeCommand(conn); err != nil {
				fmt.Fprintf(conn, "error: %v", err)
			}
		}()
	}
}

// probeModules loads what the agent of an ordinary VM loads; the other phases are those of confidential platforms.
func probeModules() error {
	list, err := os.ReadFile("/lib/modules/load")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		phase, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if phase != "early" && phase != "later" {
			continue
		}
		name, params, _ := strings.Cut(rest, " ")
		f, err := os.Open("/lib/modules/" + name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), params, 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	// The only disk is the controller's first.
	return os.WriteFile("/sys/class/scsi_host/host0/scan", []byte("0 0 0"), 0)
}

func probeCommand(conn net.Conn) error {
	in := bufio.NewReaderSize(conn, probeBuffer)
	line, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	var at, n int64
	buf := make([]byte, probeBuffer)
	switch command := strings.Fields(line); {
	case len(command) == 2 && command[0] == "source":
		if _, err := fmt.Sscan(command[1], &n); err != nil {
			return err
		}
		for ; n > 0; n -= int64(len(buf)) {
			if _, err := conn.Write(buf[:min(n, int64(len(buf)))]); err != nil {
				return err
			}
		}
		return nil
	case len(command) == 1 && command[0] == "sink":
		for {
			read, err := in.Read(buf)
			n += int64(read)
			if errors.Is(err, io.EOF) {
				return binary.Write(conn, binary.LittleEndian, n)
			}
			if err != nil {
				return err
			}
		}
	case len(command) == 1 && command[0] == "echo":
		for message := buf[:messageSize]; ; {
			if _, err := io.ReadFull(in, message); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			if _, err := conn.Write(message); err != nil {
				return err
			}
		}
	case len(command) == 3 && command[0] == "read":
		if _, err := fmt.Sscan(command[1]+" "+command[2], &at, &n); err != nil {
			return err
		}
		took, err := timeRead(probeDisk, at, n)
		if err != nil {
			return err
		}
		return binary.Write(conn, binary.LittleEndian, took.Nanoseconds())
	}
	return fmt.Errorf("unknown command %q", line)
}

// timeReadFlag makes this program, in a container, read SIZE bytes of PATH and print the nanoseconds that the second half took.
const timeReadFlag = "time-read"

func timeReadMain(path, size string) error {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	took, err := timeRead(path, 0, n)
	if err == nil {
		fmt.Println(took.Nanoseconds())
	}
	return err
}

// settleTime is how long timeRead reads what it has read before it starts the clock.
const settleTime = 2 * time.Second

// timeRead reads n bytes of a file or disk from at on and tells how long the second half took. Before, it reads the first
// half, again and again for settleTime: in a container each read has a process of its own, and under emulation everything
// on the guest's one CPU runs several times slower for about a second after a process was started in a container, reads of
// the page cache included (16 MiB in 218 ms instead of 25). That is the price of a start, which other rows show.
func timeRead(path string, at, n int64) (time.Duration, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for began := time.Now(); time.Since(began) < settleTime; {
		if err := readAll(f, at, n/2, buf); err != nil {
			return 0, err
		}
	}
	started := time.Now()
	err = readAll(f, at+n/2, n-n/2, buf)
	return time.Since(started), err
}

func readAll(f *os.File, at, n int64, buf []byte) error {
	// The plain types keep io from finding a shorter way.
	from, to := struct{ io.Reader }{io.NewSectionReader(f, at, n)}, struct{ io.Writer }{io.Discard}
	read, err := io.CopyBuffer(to, from, buf)
	if err == nil && read != n {
		err = fmt.Errorf("%s has %d bytes at %d, %d were asked for", f.Name(), read, at, n)
	}
	return err
}
