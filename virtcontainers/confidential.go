// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// What a confidential VM gets of a pod's mounts (and one of an architecture without virtio-fs). It shares nothing with the host: small volumes are copied, empty ones are
// made in the guest's memory, and everything else is refused here with the reason. The guest has rules of its own and
// does not rely on these; here they give an error that a person can act on, before anything is made.

// apart tells why the VM shares no files with the host; "" if it does, by virtio-fs.
func apart(cfg *configs.Config) string {
	_, why := vmplan.SharesFolders(cfg)
	return why
}

// refuseLive tells why a VM apart from the host's files cannot have what a bind mount brings, as far as its words tell; ""
// if it can.
func refuseLive(m specs.Mount, apart string) string {
	const instead = "bring the data in the image, a ConfigMap, a Secret or an emptyDir, or fetch it over the network"
	p := volumes.Parse(m.Source)
	switch p.Kind {
	case volumes.Copied, volumes.SubPath, volumes.TerminationLog, volumes.ImageVolume:
		return ""
	case volumes.Scratch:
		if p.Rest == "" {
			return ""
		}
		return fmt.Sprintf("%s at %s, a part of the emptyDir %s: it is in the guest's memory as a whole and the host has none of its folders; "+
			"mount the whole volume", m.Source, m.Destination, p.Volume)
	case volumes.Foreign:
		return fmt.Sprintf("volume %s (%s) at %s, from %s: %s; %s", p.Volume, p.Plugin, m.Destination, m.Source, apart, instead)
	}
	return fmt.Sprintf("bind mount of %s at %s (hostPath): %s; %s", m.Source, m.Destination, apart, instead)
}

// refusePart is refuseLive for a mounted part of a volume, which the host's mounts tell about.
func refusePart(m specs.Mount, apart string) string {
	p := volumes.Parse(m.Source)
	if p.Kind != volumes.SubPath {
		return ""
	}
	of, err := volumes.SubPathOf(p, m.Source)
	if err != nil {
		return fmt.Sprintf("%s at %s, a part (subPath) of volume %s: %v", m.Source, m.Destination, p.Volume, err)
	}
	if of.Kind == volumes.Copied {
		return ""
	}
	return refuseLive(specs.Mount{Source: filepath.Join(of.Dir(), of.Rest), Destination: m.Destination}, apart)
}

// attachApart makes a bind mount's counterpart in a guest that shares nothing. Without a mount and a reason nothing is to
// be mounted.
func (p *Pod) attachApart(ctx context.Context, c *Container, m specs.Mount) (_ *agentv1.Mount, refused string, err error) {
	g := &agentv1.Mount{Destination: m.Destination, Options: guestOptions(m.Options)}
	where := volumes.Parse(m.Source)
	switch where.Kind {
	case volumes.Copied:
		return p.attachCopied(ctx, g, where)
	case volumes.SubPath:
		return p.attachPart(ctx, g, m)
	case volumes.Scratch:
		g.Source, refused, err = p.scratchVolume(m)
		return g, refused, err
	case volumes.TerminationLog:
		file, err := readFileCopy(m)
		if err != nil {
			return nil, "", err
		}
		file.Content = nil
		log.G(ctx).WithField("container", c.id).Infof("what the container writes to %s stays in the VM: its termination message is empty", m.Destination)
		g.Source = &agentv1.Mount_File{File: file}
		return g, "", nil
	case volumes.ImageVolume:
		return p.imageVolume(g, m, c.spec)
	}
	return nil, refuseLive(m, apart(p.cfg.Config)), nil
}

// readOnly is the options with ro in place of rw.
func readOnly(options []string) []string {
	return append(slices.DeleteFunc(options, func(o string) bool { return o == "rw" || o == "ro" }), "ro")
}

// attachCopied mounts a volume that is copied, or one file of it.
func (p *Pod) attachCopied(ctx context.Context, g *agentv1.Mount, where volumes.Path) (*agentv1.Mount, string, error) {
	g.Options = readOnly(g.Options)
	name, snapshot, err := p.volumes.Mount(ctx, where.Dir())
	if err != nil {
		return nil, "", err
	}
	if where.Rest != "" && !slices.ContainsFunc(snapshot.Files, func(f volumes.File) bool { return f.Path == where.Rest }) {
		return nil, fmt.Sprintf("%s at %s: there is no such file in the volume; mount the volume, or one of its files",
			filepath.Join(where.Dir(), where.Rest), g.Destination), nil
	}
	g.Source = &agentv1.Mount_Volume{Volume: &agentv1.PodVolume{Name: name, Path: where.Rest}}
	return g, "", nil
}

// attachPart mounts a part of a volume, as it is now: the kubelet does not change it either once it is mounted.
func (p *Pod) attachPart(ctx context.Context, g *agentv1.Mount, m specs.Mount) (*agentv1.Mount, string, error) {
	if reason := refusePart(m, apart(p.cfg.Config)); reason != "" {
		return nil, reason, nil
	}
	g.Options = readOnly(g.Options)
	info, err := os.Stat(m.Source)
	if err != nil {
		return nil, "", fmt.Errorf("mount at %s: %w", m.Destination, err)
	}
	if info.IsDir() {
		name, _, err := p.volumes.MountOnce(ctx, m.Source)
		if err != nil {
			return nil, "", err
		}
		g.Source = &agentv1.Mount_Volume{Volume: &agentv1.PodVolume{Name: name}}
		return g, "", nil
	}
	file, err := readFileCopy(m)
	if err != nil {
		return nil, "", err
	}
	g.Source = &agentv1.Mount_File{File: file}
	return g, "", nil
}

// scratchVolume is an emptyDir: the guest makes it in its memory, whatever its medium is on the host. A limit that the
// kubelet put on a file system in memory goes along; that of a folder on the node's disk shows nowhere.
func (p *Pod) scratchVolume(m specs.Mount) (*agentv1.Mount_Scratch, string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(m.Source, &st); err != nil {
		return nil, "", fmt.Errorf("emptyDir %s at %s: %w", m.Source, m.Destination, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Sprintf("emptyDir %s at %s is not a folder", m.Source, m.Destination), nil
	}
	size, reason, err := p.scratchSize(m, st.Dev)
	if err != nil || reason != "" {
		return nil, reason, err
	}
	name, err := p.volumes.Scratch(m.Source)
	if err != nil {
		return nil, "", err
	}
	return &agentv1.Mount_Scratch{Scratch: &agentv1.ScratchVolume{
		Name: name, SizeBytes: size, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid,
	}}, "", nil
}

// scratchSize is the limit of the file system that the folder is the root of; 0 if there is none, or none that a VM of
// this size could keep.
func (p *Pod) scratchSize(m specs.Mount, dev uint64) (size uint64, refused string, err error) {
	var (
		fs     unix.Statfs_t
		parent unix.Stat_t
	)
	if err := errors.Join(unix.Statfs(m.Source, &fs), unix.Lstat(filepath.Dir(m.Source), &parent)); err != nil {
		return 0, "", fmt.Errorf("emptyDir %s: %w", m.Source, err)
	}
	switch {
	case parent.Dev == dev:
		return 0, "", nil
	case fs.Type == unix.HUGETLBFS_MAGIC:
		return 0, fmt.Sprintf("emptyDir %s at %s is in huge pages of the host, which a confidential VM does not have; "+
			"use medium Memory", m.Source, m.Destination), nil
	case fs.Type != unix.TMPFS_MAGIC:
		return 0, "", nil
	}
	size = fs.Blocks * uint64(fs.Bsize)
	if size >= p.doc.Memory.Bytes {
		size = 0
	}
	return size, "", nil
}

// imageVolume is a VOLUME of the image, for which containerd made a folder with the image's files in it. The guest has
// these in the container's root filesystem, which is as private and as short-lived; where there are none, it makes an
// empty folder in its memory, which goes with the container.
func (p *Pod) imageVolume(g *agentv1.Mount, m specs.Mount, spec *specs.Spec) (*agentv1.Mount, string, error) {
	d, err := os.Open(m.Source)
	if err != nil {
		return nil, "", fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	switch {
	case errors.Is(err, io.EOF):
		var st unix.Stat_t
		if err := unix.Fstat(int(d.Fd()), &st); err != nil {
			return nil, "", fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
		}
		// Not a scratch volume: these stay until the pod ends, and a container that is made anew would add one each time.
		g.Source = &agentv1.Mount_Filesystem{Filesystem: &agentv1.GuestFilesystem{Type: "tmpfs"}}
		g.Options = append(g.Options, "nosuid", "nodev",
			fmt.Sprintf("mode=%04o", st.Mode&0o7777), fmt.Sprintf("uid=%d", st.Uid), fmt.Sprintf("gid=%d", st.Gid))
		return g, "", nil
	case err != nil:
		return nil, "", fmt.Errorf("volume of the image at %s: %w", m.Destination, err)
	case spec.Root != nil && spec.Root.Readonly:
		return nil, fmt.Sprintf("volume of the image at %s, in a container with a read-only root filesystem: a confidential VM has its "+
			"files in the root filesystem alone; mount an emptyDir there, or let the root filesystem be written", m.Destination), nil
	}
	return nil, "", nil
}

// readFileCopy reads a small file of the host.
func readFileCopy(m specs.Mount) (*agentv1.FileCopy, error) {
	f, err := os.OpenFile(m.Source, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", m.Destination, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("mount at %s: %s is not a regular file: %w", m.Destination, m.Source, errdefs.ErrInvalidArgument)
	}
	content, err := io.ReadAll(io.LimitReader(f, wire.MaxFileCopy+1))
	if err != nil {
		return nil, err
	}
	if len(content) > wire.MaxFileCopy {
		return nil, fmt.Errorf("mount at %s: %s is larger than %d bytes: %w", m.Destination, m.Source, wire.MaxFileCopy, errdefs.ErrInvalidArgument)
	}
	return &agentv1.FileCopy{Content: content, Mode: st.Mode & 0o777, Uid: st.Uid, Gid: st.Gid}, nil
}

// putVolume sends a part of a volume to the guest.
func (p *Pod) putVolume(ctx context.Context, req *agentv1.PutVolumeRequest) error {
	g := p.agent()
	if g == nil {
		return p.lostError()
	}
	_, err := call(ctx, g, g.rpc.PutVolume, req)
	return err
}
