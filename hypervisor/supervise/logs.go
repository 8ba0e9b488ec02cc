// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"time"
)

// Names of the logs in a VM's state directory. Each may have an older part with the suffix ".1"; together at most 2 MiB.
const (
	ConsoleLog = "console.log"
	VMMLog     = "vmm.log"
)

// DrainGrace is for reading to its end what a VMM that is gone has left.
const DrainGrace = time.Second

// Source is a pipe or socket whose other end the VMM has.
type Source interface {
	io.ReadCloser
	SetReadDeadline(time.Time) error
}

// Logs are the tails of a VM's console and of its VMM's own words.
type Logs struct {
	Console *Tail
	VMM     *Tail

	copiers sync.WaitGroup
	sources []Source
}

// NewLogs makes both logs in a directory, where they must not exist.
func NewLogs(dir string) (*Logs, error) {
	console, err := NewTail(filepath.Join(dir, ConsoleLog))
	if err != nil {
		return nil, fmt.Errorf("console log: %w", err)
	}
	vmm, err := NewTail(filepath.Join(dir, VMMLog))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("log of the VMM: %w", err), console.Remove())
	}
	return &Logs{Console: console, VMM: vmm}, nil
}

// Copy reads the console and the VMM's output until they end, and closes them. Drain waits for it.
func (l *Logs) Copy(console, output Source) {
	l.sources = append(l.sources, console, output)
	copyTo := func(t *Tail, r Source) {
		l.copiers.Go(func() {
			defer r.Close()
			t.CopyFrom(r)
		})
	}
	copyTo(l.Console, console)
	copyTo(l.VMM, output)
}

// Drain waits until everything that a VMM wrote is read. The VMM is gone.
func (l *Logs) Drain() {
	for _, s := range l.sources {
		// Nobody else should have the other end. If somebody has, there is no end to wait for.
		_ = s.SetReadDeadline(time.Now().Add(DrainGrace))
	}
	l.copiers.Wait()
}

// Close closes the files; the tails can still be read.
func (l *Logs) Close() {
	l.Console.Close()
	l.VMM.Close()
}

// Remove removes the files.
func (l *Logs) Remove() error { return errors.Join(l.Console.Remove(), l.VMM.Remove()) }
