// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"sync"
	"time"
)

// deadline is one of the two deadlines of a net.Conn: a channel that is closed once the time has come.
// The zero value is "no deadline".
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	passed bool
	ch     chan struct{} // closed if and only if passed
	round  int           // of set; a timer of an earlier one that comes late does nothing
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.round++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.ch == nil || d.passed {
		d.ch, d.passed = make(chan struct{}), false
	}
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		d.passed = true
		close(d.ch)
		return
	}
	round := d.round
	d.timer = time.AfterFunc(left, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.round == round && !d.passed {
			d.passed = true
			close(d.ch)
		}
	})
}

// wait returns the channel to wait on. A set that extends a deadline keeps the channel.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	return d.ch
}

func (d *deadline) expired() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed
}
