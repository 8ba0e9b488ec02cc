// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Sweep removes what processes that were killed left in the cache: unfinished images and images of single containers. It is safe
// at any time; builds do it as well.
func (c *Cache) Sweep(ctx context.Context) { c.sweep(ctx) }

func (c *Cache) sweep(ctx context.Context) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		log.G(ctx).WithError(err).Warn("sweep the layer cache")
		return
	}
	for _, e := range entries {
		path := filepath.Join(c.dir, e.Name())
		if strings.HasPrefix(e.Name(), freshPrefix) {
			removeUnlocked(path)
			continue
		}
		if key, ok := strings.CutSuffix(e.Name(), tempSuffix); ok {
			if lock, err := lockFile(c.lock(key), unix.LOCK_EX|unix.LOCK_NB); err == nil {
				_ = os.Remove(path)
				c.dropLock(key, lock)
			}
		} else if key, ok := strings.CutSuffix(e.Name(), lockSuffix); ok {
			if _, err := os.Lstat(c.image(key)); os.IsNotExist(err) {
				if lock, err := lockFile(path, unix.LOCK_EX|unix.LOCK_NB); err == nil {
					c.dropLock(key, lock)
				}
			}
		}
	}
}

// dropLock removes a lock file whose image is gone. Whoever waits for it notices and makes a new one.
func (c *Cache) dropLock(key string, lock *os.File) {
	if _, err := os.Lstat(c.image(key)); os.IsNotExist(err) {
		_ = os.Remove(c.lock(key))
	}
	lock.Close()
}

// removeUnlocked removes an image that no process has open and locked.
func removeUnlocked(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false
	}
	return os.Remove(path) == nil
}

// evict removes images that nobody uses, the ones used longest ago first, until the rest takes no more than limit bytes.
func (c *Cache) evict(ctx context.Context, limit int64) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		log.G(ctx).WithError(err).Warn("evict from the layer cache")
		return
	}
	type candidate struct {
		key   string
		bytes int64
		used  time.Time
	}
	var all []candidate
	total := int64(0)
	for _, e := range entries {
		key, ok := strings.CutSuffix(e.Name(), imageSuffix)
		info, err := e.Info()
		if !ok || err != nil || !info.Mode().IsRegular() {
			continue
		}
		bytes := info.Size()
		total += bytes
		if !strings.HasPrefix(key, freshPrefix) {
			all = append(all, candidate{key, bytes, info.ModTime()})
		}
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.key, b.key)) })
	for _, e := range all {
		if total <= limit {
			return
		}
		// The lock keeps builders of the same image away between the look at it and its removal.
		lock, err := lockFile(c.lock(e.key), unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue
		}
		if removeUnlocked(c.image(e.key)) {
			total -= e.bytes
			log.G(ctx).WithField("image", c.image(e.key)).WithField("bytes", e.bytes).Debug("evicted an image from the layer cache")
		}
		c.dropLock(e.key, lock)
	}
}
