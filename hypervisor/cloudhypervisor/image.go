// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// image is the file or device behind a disk, held without being open (O_PATH): whatever comes to lie at its path, it is this one
// that the VMM has.
type image struct {
	file     *os.File
	dev, ino uint64
	// held is how many times the VMM had it open when its removal was first asked for; 0 until then. It belongs to who has
	// taken the disk out of the table.
	held int
}

func openImage(path string) (*image, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("disk image %s: %w", path, err)
	}
	i := &image{file: os.NewFile(uintptr(fd), path)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		i.close()
		return nil, fmt.Errorf("disk image %s: %w", path, err)
	}
	i.dev, i.ino = st.Dev, st.Ino
	return i, nil
}

func (i *image) close() { _ = i.file.Close() }

func (i *image) same(other *image) bool { return i.dev == other.dev && i.ino == other.ino }

// openIn returns how many times a process has the image open.
func (i *image) openIn(pid int) (n int, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	d, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		var st unix.Stat_t
		// One that is gone meanwhile is not open.
		if unix.Stat(filepath.Join(dir, name), &st) == nil && st.Dev == i.dev && st.Ino == i.ino {
			n++
		}
	}
	return n, nil
}

// closings is a watch that tells when somebody closes an image.
type closings struct {
	file   *os.File
	events chan struct{} // one is kept
	ended  chan struct{}
}

func (i *image) watch() (*closings, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch a disk's image: %w", err)
	}
	c := &closings{file: os.NewFile(uintptr(fd), "inotify"), events: make(chan struct{}, 1), ended: make(chan struct{})}
	if _, err := unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", i.file.Fd()), unix.IN_CLOSE); err != nil {
		_ = c.file.Close()
		return nil, fmt.Errorf("watch a disk's image (fs.inotify.max_user_watches): %w", err)
	}
	go func() {
		defer close(c.ended)
		events := make([]byte, 4<<10)
		for {
			if _, err := c.file.Read(events); err != nil {
				return
			}
			select {
			case c.events <- struct{}{}:
			default:
			}
		}
	}()
	return c, nil
}

func (c *closings) close() {
	_ = c.file.Close()
	<-c.ended
}
