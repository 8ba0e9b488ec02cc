// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/internal/idmap"
)

// MountCapabilities is what a shim that uses this package announces to containerd 2.4 as an extension of its bootstrap result, so
// that mounts reach it before anything is done for them on the host (containerd docs/shim-capabilities.md). A transform is only
// left to the shim together with all that follow it in a chain such as "format/mkdir/overlay", and mkfs makes files that nobody
// would use, so all three are claimed.
func MountCapabilities() *types.MountCapabilities {
	return &types.MountCapabilities{Types: []string{"erofs"}, Transforms: []string{"format", "mkdir", "mkfs"}}
}

// RuntimeAllowMounts says the same to containerd 2.2 and 2.3: it is the value of the annotation
// "containerd.io/runtime-allow-mounts" in the answer to -info.
const RuntimeAllowMounts = "erofs,format/*,mkdir/*,mkfs/*"

// FilesystemEROFS is the only type of filesystem that layers have.
const FilesystemEROFS = "erofs"

// MaxLayers bounds the layers of a root filesystem; overlayfs takes no more.
const MaxLayers = 500

// Layer is a read-only block image.
type Layer struct {
	// Path of the image file.
	Path string
	// Filesystem type in the image.
	Filesystem string
	// Extra are the further devices of a multi-device image, in the order in which the guest names them when it mounts.
	Extra []string
	// Key is the same for the same image and different for different ones: 64 hex digits. Containers of a pod share a disk by it.
	Key string
	// Mapped says that its files' owners are to be mapped by Rootfs.IDs.
	Mapped bool
}

// Rootfs is a resolved root filesystem. Its images stay in place until Release.
type Rootfs struct {
	// Layers, topmost first. None means an empty root filesystem.
	Layers []Layer
	// ReadOnly is set if the mounts give the container no writable layer.
	ReadOnly bool
	// WritableBytes is the size that the snapshotter allots to the writable layer; 0 if it sets no limit.
	WritableBytes int64
	// IDs is the map of the user namespace that it was made for; none if the snapshotter asks for no mapping.
	IDs idmap.Map

	once  sync.Once
	files []*os.File // locked shared
	fresh []string   // images of this container only
}

// Release gives the images back: those of this container alone are removed, shared ones can be evicted again. Call it when no
// VM has them open any more. Further calls do nothing.
func (r *Rootfs) Release() error {
	var errs []error
	r.once.Do(func() {
		for _, path := range r.fresh {
			if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
				errs = append(errs, err)
			}
		}
		for _, f := range r.files {
			errs = append(errs, f.Close())
		}
	})
	return errors.Join(errs...)
}

// Directory is the mounts of a root filesystem that a directory of the host has (`ctr run --rootfs`), without a snapshotter: it is
// copied into an image of the container's own.
func Directory(path string) []*types.Mount {
	return []*types.Mount{{Type: "bind", Source: path, Options: []string{"rbind", "rw"}}}
}

// Check returns the error that Resolve would return for the words of the mounts. It looks at no file.
func Check(mounts []*types.Mount) error {
	if _, err := parseMounts(mounts); err != nil {
		return fmt.Errorf("root filesystem: %w", err)
	}
	return nil
}

// Resolve turns the mounts of a CreateTaskRequest into images. It returns errdefs.ErrInvalidArgument for mounts that make no
// sense, errdefs.ErrNotImplemented for those it does not know, errdefs.ErrNotFound for directories and images that are missing.
// If ctx ends, the build of an image goes on only while others wait for it.
func (c *Cache) Resolve(ctx context.Context, mounts []*types.Mount) (*Rootfs, error) {
	p, err := parseMounts(mounts)
	if err != nil {
		return nil, fmt.Errorf("root filesystem: %w", err)
	}
	r := &Rootfs{ReadOnly: p.readOnly, WritableBytes: p.writableBytes, IDs: p.ids}
	if err := c.resolve(ctx, p, r); err != nil {
		return nil, errors.Join(fmt.Errorf("root filesystem: %w", err), r.Release())
	}
	return r, nil
}

func (c *Cache) resolve(ctx context.Context, p *plan, r *Rootfs) error {
	for _, image := range p.images {
		layer, err := openLayer(image)
		if err != nil {
			return err
		}
		layer.Mapped = !r.IDs.IsZero()
		r.Layers = append(r.Layers, layer)
	}
	switch {
	case p.tree != nil:
		return c.resolveTree(ctx, p.tree, r)
	case len(r.Layers) == 0 && !p.empty:
		return fmt.Errorf("the mounts name no layer: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}
