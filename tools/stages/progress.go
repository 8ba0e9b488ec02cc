// SPDX-License-Identifier: Apache-2.0

package stages

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// How often a sign of life is shown: in place on a terminal, as a line of its own elsewhere.
const (
	terminalInterval = time.Second
	lineInterval     = 15 * time.Second
)

// Progress writes what several stages have to say to one output.
type Progress struct {
	terminal bool

	mu      sync.Mutex
	out     io.Writer
	status  bool // the terminal's last line is a sign of life
	running []*Running
	record  Record
	started time.Time
}

// Running is a stage that runs.
type Running struct {
	progress   *Progress
	name       string
	estimate   string
	background bool
	started    time.Time
}

// New returns a Progress that continues what was recorded before. Call Watch for signs of life.
func New(out io.Writer, before Record) *Progress {
	p := &Progress{out: out, record: before, started: time.Now()}
	if f, ok := out.(*os.File); ok {
		info, err := f.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb" && f.Name() != os.DevNull
	}
	return p
}

// Begin shows that a stage begins. The estimate, if any, says how long that takes.
func (p *Progress) Begin(name, estimate string, background bool) *Running {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &Running{progress: p, name: name, estimate: estimate, background: background, started: time.Now()}
	p.running = append(p.running, r)
	line := "==> " + name
	if background {
		line += ", in the background"
	}
	if estimate != "" {
		line += " (" + estimate + ")"
	}
	p.println(line)
	return r
}

// End shows and records that the stage has ended.
func (r *Running) End(result string) {
	took := time.Since(r.started)
	p := r.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove(r)
	p.record.Stages = append(p.record.Stages, Stage{Name: r.name, Result: result, Took: took, Background: r.background})
	line := "    " + seconds(took)
	if r.background {
		line = "    " + r.name + ": done after " + seconds(took)
	}
	if result != "" {
		line += "  " + result
	}
	p.println(line)
}

// Fail shows that the stage has failed, with what is worth repeating of its output.
func (r *Running) Fail(output string) {
	took := time.Since(r.started)
	p := r.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove(r)
	if output = strings.TrimRight(output, "\n"); output != "" {
		p.println(fmt.Sprintf("\n==> %s: all of its output:\n%s", r.name, output))
	}
	p.println(fmt.Sprintf("    %s: failed after %s", r.name, seconds(took)))
}

// Stop shows that the stage was ended because of something else.
func (r *Running) Stop() {
	took := time.Since(r.started)
	p := r.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	p.remove(r)
	p.println(fmt.Sprintf("    %s: stopped after %s", r.name, seconds(took)))
}

// Output returns a writer for what the stage's programs print. It is to be closed when they have ended.
func (r *Running) Output() io.WriteCloser { return &lines{progress: r.progress} }

// Println writes a line of its own.
func (p *Progress) Println(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.println(line)
}

// Record returns what has ended so far, and the time since New added to that of before.
func (p *Progress) Record() Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Record{Stages: slices.Clone(p.record.Stages), Wall: p.record.Wall + time.Since(p.started)}
}

// Watch shows signs of life of the stages that run, until ctx ends.
func (p *Progress) Watch(ctx context.Context) {
	interval := lineInterval
	if p.terminal {
		interval = terminalInterval
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			p.mu.Lock()
			p.clear()
			p.mu.Unlock()
			return
		case <-ticker.C:
			p.mu.Lock()
			p.alive()
			p.mu.Unlock()
		}
	}
}

// alive names what runs, since when, and for how long it will; but nothing that has just begun.
func (p *Progress) alive() {
	var parts []string
	for _, r := range p.running {
		ran := time.Since(r.started)
		if ran < time.Second {
			continue
		}
		part := fmt.Sprintf("%s: %d s", r.name, int(ran.Seconds()))
		if r.estimate != "" {
			part += " (" + r.estimate + ")"
		}
		parts = append(parts, part)
	}
	if len(parts) == 0 {
		return
	}
	// The one in the foreground is the last to begin, and the first to be named.
	slices.Reverse(parts)
	line := "    ... " + strings.Join(parts, ", ")
	if !p.terminal {
		p.println(line)
		return
	}
	p.clear()
	// Cut, since what wraps cannot be cleared.
	fmt.Fprintf(p.out, "%.79s", line)
	p.status = true
}

func (p *Progress) remove(r *Running) {
	p.running = slices.DeleteFunc(p.running, func(other *Running) bool { return other == r })
}

func (p *Progress) println(line string) {
	p.clear()
	fmt.Fprintln(p.out, line)
}

func (p *Progress) clear() {
	if p.status {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.status = false
	}
}

// lines shows whole lines, indented below the stage that they belong to.
type lines struct {
	progress *Progress

	mu      sync.Mutex
	partial []byte
}

func (l *lines) Write(data []byte) (int, error) {
	l.mu.Lock()
	l.partial = append(l.partial, data...)
	var whole []string
	for {
		line, rest, found := strings.Cut(string(l.partial), "\n")
		if !found {
			break
		}
		whole, l.partial = append(whole, "    | "+line), []byte(rest)
	}
	l.mu.Unlock()
	if len(whole) > 0 {
		l.progress.Println(strings.Join(whole, "\n"))
	}
	return len(data), nil
}

// Close shows what came after the last line's end.
func (l *lines) Close() error {
	l.mu.Lock()
	whole := len(l.partial) == 0
	l.mu.Unlock()
	if whole {
		return nil
	}
	_, err := l.Write([]byte{'\n'})
	return err
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
