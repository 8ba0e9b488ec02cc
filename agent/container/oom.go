// SPDX-License-Identifier: Apache-2.0

package container

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// oomWatcher calls back when a container's memory.events changes. One inotify instance serves all containers.
type oomWatcher struct {
	file *os.File
	done chan struct{}

	mu      sync.Mutex
	watches map[int32]func()
}

func newOOMWatcher() (*oomWatcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify_init1: %w", err)
	}
	w := &oomWatcher{file: os.NewFile(uintptr(fd), "inotify"), done: make(chan struct{}), watches: map[int32]func(){}}
	go w.run()
	return w, nil
}

// add watches the cgroup at dir. The watch ends with the cgroup, or by cancel.
func (w *oomWatcher) add(dir string, changed func()) (cancel func(), err error) {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var wd int
	var sysErr error
	// The lock is held so that an event cannot arrive before its watch is known; inotify_add_watch does no I/O here.
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := raw.Control(func(fd uintptr) {
		wd, sysErr = unix.InotifyAddWatch(int(fd), filepath.Join(dir, "memory.events"), unix.IN_MODIFY)
	}); err != nil {
		return nil, err
	}
	if sysErr != nil {
		return nil, fmt.Errorf("watch memory.events: %w", sysErr)
	}
	w.watches[int32(wd)] = changed
	return func() {
		w.mu.Lock()
		_, ok := w.watches[int32(wd)]
		delete(w.watches, int32(wd))
		w.mu.Unlock()
		if ok {
			_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
		}
	}, nil
}

func (w *oomWatcher) run() {
	defer close(w.done)
	buf := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			return
		}
		for off := 0; off+unix.SizeofInotifyEvent <= n; {
			wd := int32(binary.NativeEndian.Uint32(buf[off:]))
			mask := binary.NativeEndian.Uint32(buf[off+4:])
			off += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[off+12:]))
			w.mu.Lock()
			var calls []func()
			switch {
			case mask&unix.IN_Q_OVERFLOW != 0:
				for _, c := range w.watches {
					calls = append(calls, c)
				}
			case mask&unix.IN_IGNORED != 0:
				delete(w.watches, wd)
			case w.watches[wd] != nil:
				calls = append(calls, w.watches[wd])
			}
			w.mu.Unlock()
			for _, c := range calls {
				c()
			}
		}
	}
}

func (w *oomWatcher) close() {
	_ = w.file.Close()
	<-w.done
}

// oomKills reads how often the OOM killer struck in a cgroup and below it. A cgroup without the memory controller has
// no count, which is no error.
func oomKills(dir string) (uint64, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "memory.events"))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for _, line := range bytes.Split(raw, []byte("\n")) {
		if value, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			return strconv.ParseUint(string(value), 10, 64)
		}
	}
	return 0, nil
}
