// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// probe is a VM like a pod's, whose init is probeMain.
type probe struct{ vm hypervisor.VM }

// startProbe boots a probe, whose document and resources change may make another's, and returns when it answers. What change
// puts into the resources goes with the VM, or with an error.
func (b *bench) startProbe(ctx context.Context, name string, change func(*hypervisor.Document, *hypervisor.Resources)) (_ *probe,
	err error) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	image, err := os.Open(b.artifacts.Initrd)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	initrd, err := probeInitrd(image, self)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(b.dir, name+".img")
	if err := os.WriteFile(path, initrd, 0o600); err != nil {
		return nil, err
	}
	state := filepath.Join(b.dir, name)
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, err
	}
	doc := hypervisor.Document{
		ID: name, UUID: uuid.NewString(), Accelerator: b.accel,
		CPU:    hypervisor.CPU{Model: b.bare.cpu, Count: b.bare.vcpus},
		Memory: hypervisor.Memory{Bytes: uint64(b.bare.memoryMiB) << 20, Shared: true},
		Boot:   hypervisor.Boot{Kernel: b.bare.kernel, Initrd: path, Parameters: []string{"console=ttyS0", "quiet", "panic=-1"}},
		Vsock:  hypervisor.Vsock{Kind: hypervisor.VsockVhostUser, CID: 3},
		// As a pod has them.
		SharedDirectories: 2, Sandboxed: true,
	}
	res := hypervisor.Resources{StateDir: state}
	change(&doc, &res)
	vm, err := b.driver.Start(ctx, doc, res)
	if err != nil {
		return nil, err
	}
	p := &probe{vm}
	defer func() {
		if err != nil {
			vm.Kill()
			err = fmt.Errorf("%w; the probe's console: %s", err, vm.Exit().Console)
		}
	}()
	if err := vm.Boot(ctx); err != nil {
		return nil, err
	}
	// Dial waits for the guest's driver, and is refused until somebody listens.
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		conn, err := vm.Vsock().Dial(ctx, probePort)
		if err == nil {
			return p, conn.Close()
		}
		if !errors.Is(err, vsock.ErrRefused) {
			return nil, err
		}
		select {
		case <-ticker.C:
		case <-vm.Done():
			return nil, errors.New("the probe's VM ended")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (p *probe) kill() { p.vm.Kill() }

// command opens a connection and sends a line. The connection ends with ctx.
func (p *probe) command(ctx context.Context, format string, args ...any) (_ vsock.Conn, end func(), err error) {
	conn, err := p.vm.Vsock().Dial(ctx, probePort)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	end = func() { stop(); _ = conn.Close() }
	if _, err := fmt.Fprintf(conn, format+"\n", args...); err != nil {
		end()
		return nil, nil, err
	}
	return conn, end, nil
}

// fromGuest receives so many bytes and returns the rate in MiB/s from the first piece to the last.
func (p *probe) fromGuest(ctx context.Context, bytes int) (float64, error) {
	conn, end, err := p.command(ctx, "source %d", bytes)
	if err != nil {
		return 0, err
	}
	defer end()
	return receive(conn, bytes)
}

// toGuest sends so many bytes and returns the rate in MiB/s until the guest has them all.
func (p *probe) toGuest(ctx context.Context, bytes int) (float64, error) {
	conn, end, err := p.command(ctx, "sink")
	if err != nil {
		return 0, err
	}
	defer end()
	started := time.Now()
	if err := send(conn, bytes); err != nil {
		return 0, err
	}
	if err := conn.CloseWrite(); err != nil {
		return 0, err
	}
	got, err := readNumber(conn)
	if err == nil && got != int64(bytes) {
		err = fmt.Errorf("the probe got %d bytes of %d", got, bytes)
	}
	return mibPerSecond(bytes, time.Since(started)), err
}

// roundTrip sends so many messages of messageSize bytes, each after the answer to the one before, and returns the
// microseconds that one took. The first is not counted: it starts the program on the other side.
func (p *probe) roundTrip(ctx context.Context, times int) (float64, error) {
	conn, end, err := p.command(ctx, "echo")
	if err != nil {
		return 0, err
	}
	defer end()
	var started time.Time
	message := make([]byte, messageSize)
	for i := range times + 1 {
		if i == 1 {
			started = time.Now()
		}
		if _, err := conn.Write(message); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(conn, message); err != nil {
			return 0, err
		}
	}
	return float64(time.Since(started).Nanoseconds()) / 1000 / float64(times), nil
}

// readDisk has the guest read so many bytes straight from the disk and returns the rate in MiB/s.
func (p *probe) readDisk(ctx context.Context, at, bytes int) (float64, error) {
	conn, end, err := p.command(ctx, "read %d %d", at, bytes)
	if err != nil {
		return 0, err
	}
	defer end()
	nanos, err := readNumber(conn)
	if err != nil {
		return 0, err
	}
	return mibPerSecond(bytes/2, time.Duration(nanos)), nil
}

// readNumber reads the answer of 8 bytes, which errors do not have.
func readNumber(r io.Reader) (int64, error) {
	answer, err := io.ReadAll(io.LimitReader(r, 1<<10))
	if err != nil {
		return 0, err
	}
	if len(answer) != 8 {
		return 0, fmt.Errorf("the probe answered %q", answer)
	}
	return int64(binary.LittleEndian.Uint64(answer)), nil
}

// receive reads to the end of a stream, which must be so many bytes long. The clock runs from the first piece on, which
// does not count: what it took to start the sender is not the stream's.
func receive(r io.Reader, bytes int) (float64, error) {
	buf := make([]byte, probeBuffer)
	first, err := io.ReadAtLeast(r, buf, 1)
	if err != nil {
		return 0, fmt.Errorf("wait for the first bytes: %w", err)
	}
	started := time.Now()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
	if err == nil && first+int(n) != bytes {
		err = fmt.Errorf("%d bytes of %d came", first+int(n), bytes)
	}
	return mibPerSecond(int(n), time.Since(started)), err
}

// send writes so many bytes.
func send(w io.Writer, bytes int) error {
	buf := make([]byte, probeBuffer)
	for left := bytes; left > 0; left -= len(buf) {
		if _, err := w.Write(buf[:min(left, len(buf))]); err != nil {
			return err
		}
	}
	return nil
}
