// SPDX-License-Identifier: Apache-2.0

package fwcfg

import (
	"bytes"
	"regexp"
	"strconv"
	"sync"
)

// QEMU's trace event of an item being selected by the guest, and how much of QEMU's other words is kept.
const (
	traceSelect = "fw_cfg_select"
	stderrTail  = 4096
)

var selectLine = regexp.MustCompile(`^fw_cfg_select 0x[0-9a-f]+ key 0x([0-9a-f]+) `)

// traceReader takes QEMU's error output: it waits for the item to be selected, and keeps the rest for messages.
type traceReader struct {
	mu       sync.Mutex
	key      uint64
	armed    bool
	partial  []byte
	rest     []byte
	selected chan struct{}
}

func (t *traceReader) watch(key uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.key, t.armed = uint64(key), true
}

func (t *traceReader) tail() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(append(t.rest[:len(t.rest):len(t.rest)], t.partial...))
}

// Write never fails.
func (t *traceReader) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.partial = append(t.partial, b...)
	for {
		line, behind, ok := bytes.Cut(t.partial, []byte("\n"))
		if !ok {
			break
		}
		t.line(line)
		t.partial = behind
	}
	if len(t.partial) > stderrTail {
		t.partial = t.partial[len(t.partial)-stderrTail:]
	}
	return len(b), nil
}

func (t *traceReader) line(line []byte) {
	m := selectLine.FindSubmatch(line)
	if m == nil {
		t.rest = append(append(t.rest, line...), '\n')
		t.rest = t.rest[max(0, len(t.rest)-stderrTail):]
		return
	}
	if key, err := strconv.ParseUint(string(m[1]), 16, 16); err == nil && t.armed && key == t.key {
		select {
		case t.selected <- struct{}{}:
		default: // told already
		}
	}
}
