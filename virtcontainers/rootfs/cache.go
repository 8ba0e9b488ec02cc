// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/rootfs/erofsimg"
)

const (
	imageSuffix = ".img"
	lockSuffix  = ".lock"
	tempSuffix  = ".tmp"
	freshPrefix = "fresh-"
)

// Cache is a directory of EROFS images, shared by all processes that open it. See the package's documentation.
type Cache struct {
	dir      string
	maxBytes int64

	mu      sync.Mutex
	flights map[string]*flight

	build func(ctx context.Context, t *tree, keepOverlay bool, uuid [16]byte, out *os.File) error // replaced by tests
}

// flight is a build that callers in this process wait for together.
type flight struct {
	done    chan struct{}
	cancel  context.CancelFunc
	waiters int // guarded by Cache.mu

	// Set before done is closed: the image, locked shared until the last waiter has opened it for itself.
	file *os.File
	err  error
}

// OpenCache opens the cache in dir, an absolute path, and makes the directory if need be. maxBytes bounds the disk space that its
// images take together; those in use are not removed for it; 0 means no bound.
func OpenCache(dir string, maxBytes int64) (*Cache, error) {
	if err := cleanPath("rootfs.cache_dir", dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, unusable(dir, err)
	}
	c := &Cache{dir: dir, maxBytes: maxBytes, flights: make(map[string]*flight)}
	c.build = c.buildTree
	return c, nil
}

// unusable explains an error of making, opening or renaming a file in the cache.
func unusable(dir string, err error) error {
	const setting = "rootfs.cache_dir"
	switch {
	case isFull(err):
		return fmt.Errorf("the filesystem of the image cache %s is full, also after removing every image that no pod uses; "+
			"free space there or set %s to another filesystem: %w: %w", dir, setting, err, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOENT), errors.Is(err,
		unix.ENOTDIR):
		return fmt.Errorf("the image cache %s cannot be written; make it a directory that root can write, or set %s to another one: %w: %w",
			dir, setting, err, errdefs.ErrFailedPrecondition)
	}
	return err
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// resolveTree makes the layers of a stack of directories.
func (c *Cache) resolveTree(ctx context.Context, t *tree, r *Rootfs) error {
	written := false
	if t.upper != "" {
		var err error
		if written, err = holdsFiles(t.upper); err != nil {
			return err
		}
	}
	if written {
		layer, err := c.fresh(ctx, &tree{lowers: []string{t.upper}, userXattr: t.userXattr}, len(t.lowers) > 0 || len(r.Layers) > 0, r)
		switch {
		case errors.Is(err, erofsimg.ErrNeedsMerge) && len(t.lowers) > 0:
			// Its marks make sense only together with the layers below.
			if !r.IDs.IsZero() {
				return fmt.Errorf("something was written to %s before the container started, whose owners are not to be mapped as the other "+
					"layers' are: %w: %w", t.upper, err, errdefs.ErrNotImplemented)
			}
			all := *t
			all.lowers = append([]string{t.upper}, t.lowers...)
			if layer, err = c.fresh(ctx, &all, false, r); err != nil {
				return err
			}
			r.Layers = append(r.Layers, layer)
			return nil
		case errors.Is(err, erofsimg.ErrNeedsMerge):
			return fmt.Errorf("something was written to %s before the container started, and it cannot become a layer of its own: %w: %w",
				t.upper, err, errdefs.ErrNotImplemented)
		case err != nil:
			return err
		}
		r.Layers = append([]Layer{layer}, r.Layers...)
	}
	if len(t.lowers) == 0 {
		return nil
	}
	key, err := treeKey(t)
	if err != nil {
		return err
	}
	f, err := c.acquire(ctx, key, t)
	if err != nil {
		return err
	}
	r.files = append(r.files, f)
	r.Layers = append(r.Layers, Layer{Path: c.image(key), Filesystem: FilesystemEROFS, Key: key, Mapped: !r.IDs.IsZero()})
	return nil
}

func holdsFiles(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, missing("directory", dir, err)
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if len(names) > 0 {
		return true, nil
	}
	if st, e := f.Stat(); e == nil && !st.IsDir() {
		return false, fmt.Errorf("%s is not a directory: %w", dir, errdefs.ErrInvalidArgument)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("directory %s: %w", dir, err)
	}
	return false, nil
}

func (c *Cache) image(key string) string { return filepath.Join(c.dir, key+imageSuffix) }
func (c *Cache) lock(key string) string  { return filepath.Join(c.dir, key+lockSuffix) }
func (c *Cache) temp(key string) string  { return filepath.Join(c.dir, key+tempSuffix) }

// uuidOf is the volume's UUID that images of a key have.
func uuidOf(key string) (uuid [16]byte) {
	b, _ := hex.DecodeString(key) // keys are made by this package
	copy(uuid[:], b)
	return uuid
}

// errNoImage says that an image has to be built.
var errNoImage = errors.New("no such image in the cache")

// acquire returns the image of a key, locked shared, and has it built first if it is not there.
func (c *Cache) acquire(ctx context.Context, key string, t *tree) (*os.File, error) {
	f, err := c.openImage(ctx, key)
	if !errors.Is(err, errNoImage) {
		return f, err
	}
	fl := c.board(ctx, key, t)
	defer c.leave(key, fl)
	select {
	case <-fl.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the image of %d layers: %w", len(t.lowers), ctx.Err())
	}
	if fl.err != nil {
		return nil, fl.err
	}
	return c.openImage(ctx, key) // there, because fl.file is locked
}

// openImage opens and locks an image that is whole.
func (c *Cache) openImage(ctx context.Context, key string) (*os.File, error) {
	f, err := os.OpenFile(c.image(key), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if os.IsNotExist(err) {
		return nil, errNoImage
	}
	if err != nil {
		return nil, unusable(c.dir, err)
	}
	// Locked exclusively means that it is being evicted.
	err = flock(f, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		err = c.check(f, key)
	}
	if err == nil {
		now := unix.NsecToTimeval(time.Now().UnixNano())
		_ = unix.Futimes(int(f.Fd()), []unix.Timeval{now, now}) // for eviction; if it fails, the image looks older
		return f, nil
	}
	f.Close()
	if errors.Is(err, errDamaged) {
		log.G(ctx).WithError(err).WithField("image", c.image(key)).Warn("image in the layer cache is damaged and will be built again")
		err = errNoImage
	}
	if errors.Is(err, errLocked) {
		err = errNoImage
	}
	return nil, err
}

var errDamaged = errors.New("damaged")

func (c *Cache) check(f *os.File, key string) error {
	same, err := isFileAt(f, c.image(key))
	if err != nil {
		return err
	}
	if !same {
		return errNoImage
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := erofsimg.Verify(f, st.Size(), uuidOf(key)); err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil
}

// board joins the build of a key or starts it. leave must follow.
func (c *Cache) board(ctx context.Context, key string, t *tree) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	fl := c.flights[key]
	if fl == nil {
		// The build belongs to all that wait for it, not to the first.
		buildCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		fl = &flight{done: make(chan struct{}), cancel: cancel}
		c.flights[key] = fl
		go func() {
			fl.file, fl.err = c.produce(buildCtx, key, t)
			close(fl.done)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.land(key, fl)
		}()
	}
	fl.waiters++
	return fl
}

// leave gives a flight up. The last one to leave before the end cancels the build.
func (c *Cache) leave(key string, fl *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fl.waiters--
	c.land(key, fl)
}

// land ends a flight that nobody waits for. Called with mu held.
func (c *Cache) land(key string, fl *flight) {
	if fl.waiters > 0 {
		return
	}
	fl.cancel()
	if c.flights[key] == fl {
		delete(c.flights, key)
	}
	select {
	case <-fl.done:
		if fl.file != nil {
			fl.file.Close()
			fl.file = nil
		}
	default: // produce ends soon; then land is called again
	}
}

// produce builds the image of a key, unless another process has done it meanwhile. It waits for that other one as long as it
// takes, ctx or not: flock cannot be interrupted.
func (c *Cache) produce(ctx context.Context, key string, t *tree) (*os.File, error) {
	lock, err := lockFile(c.lock(key), unix.LOCK_EX)
	if err != nil {
		return nil, unusable(c.dir, err)
	}
	defer lock.Close()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if f, err := c.openImage(ctx, key); !errors.Is(err, errNoImage) {
		return f, err
	}
	started := time.Now()
	if err := c.buildTemp(ctx, key, t); err != nil {
		if e := os.Remove(c.temp(key)); e != nil && !os.IsNotExist(e) {
			log.G(ctx).WithError(e).Warn("remove an unfinished image")
		}
		return nil, err
	}
	if err := os.Rename(c.temp(key), c.image(key)); err != nil {
		return nil, unusable(c.dir, err)
	}
	if err := syncDir(c.dir); err != nil {
		return nil, err
	}
	f, err := c.openImage(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("open an image just built: %w", err)
	}
	st, _ := f.Stat()
	log.G(ctx).WithField("image", c.image(key)).WithField("layers", len(t.lowers)).WithField("bytes", st.Size()).
		WithField("took", time.Since(started)).Debug("built the image of a layer chain")
	c.sweep(ctx)
	if c.maxBytes > 0 {
		c.evict(ctx, c.maxBytes)
	}
	return f, nil
}

// buildTemp writes the image beside its place and to the disk. Called with the key's lock held.
func (c *Cache) buildTemp(ctx context.Context, key string, t *tree) error {
	f, err := os.OpenFile(c.temp(key), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return unusable(c.dir, err)
	}
	defer f.Close()
	if err := c.buildEvicting(ctx, t, false, uuidOf(key), f); err != nil {
		return err
	}
	return f.Sync()
}

// buildEvicting builds into the empty file out. If the disk is full it removes all images that nobody uses and tries again.
func (c *Cache) buildEvicting(ctx context.Context, t *tree, keepOverlay bool, uuid [16]byte, out *os.File) error {
	err := c.build(ctx, t, keepOverlay, uuid, out)
	if isFull(err) {
		if err := out.Truncate(0); err != nil {
			return err
		}
		c.sweep(ctx)
		c.evict(ctx, 0)
		err = c.build(ctx, t, keepOverlay, uuid, out)
	}
	if isFull(err) {
		return unusable(c.dir, err)
	}
	return err // of the layers' own directories, most likely
}

func (c *Cache) buildTree(ctx context.Context, t *tree, keepOverlay bool, uuid [16]byte, out *os.File) error {
	return withTree(t.lowers, t.merge, c.dir, overlayAnyhow, func(dirfd int) error {
		_, err := erofsimg.Build(ctx, dirfd, out, erofsimg.Options{UUID: uuid, KeepOverlay: keepOverlay, UserXattr: t.userXattr})
		return err
	})
}

// fresh builds an image that is used once and removed by Release. asLayer keeps its marks for the layers below.
func (c *Cache) fresh(ctx context.Context, t *tree, asLayer bool, r *Rootfs) (Layer, error) {
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	key := hex.EncodeToString(id[:])
	path := filepath.Join(c.dir, freshPrefix+key+imageSuffix)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Layer{}, unusable(c.dir, err)
	}
	err = flock(f, unix.LOCK_SH|unix.LOCK_NB)
	if same, e := isFileAt(f, path); err == nil && (e != nil || !same) {
		err = errLocked // a sweeper came between; it takes each file once
	}
	if errors.Is(err, errLocked) {
		f.Close()
		return c.fresh(ctx, t, asLayer, r)
	}
	if err == nil {
		err = c.buildEvicting(ctx, t, asLayer, uuidOf(key), f)
	}
	if err != nil {
		f.Close()
		return Layer{}, errors.Join(err, os.Remove(path))
	}
	r.files = append(r.files, f)
	r.fresh = append(r.fresh, path)
	return Layer{Path: path, Filesystem: FilesystemEROFS, Key: key}, nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
