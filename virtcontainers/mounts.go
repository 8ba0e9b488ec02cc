// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/share"
)

// shareTag is the virtio-fs tag of the pod's one shared folder.
const shareTag = "cloister"

// attachMounts turns a container's mounts into what the agent mounts: filesystems of the guest's kernel, the pod's
// /dev/shm, copies of the files that containerd writes for every container, and live folders and files of the host, or
// what a confidential VM gets in their place. Everything that cannot be had is gathered into one RefusedError.
func (p *Pod) attachMounts(ctx context.Context, c *Container, mounts []specs.Mount) ([]*agentv1.Mount, error) {
	var (
		out     []*agentv1.Mount
		refused []string
		copied  int
	)
	for _, m := range mounts {
		g := &agentv1.Mount{Destination: m.Destination, Options: guestOptions(m.Options)}
		switch {
		case !isBind(m):
			g.Source = &agentv1.Mount_Filesystem{Filesystem: &agentv1.GuestFilesystem{Type: m.Type}}
		case filepath.Clean(m.Destination) == podShm:
			g.Source = &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}
		case strings.HasPrefix(filepath.Clean(m.Source), "/sys/fs/cgroup"):
			g.Source = &agentv1.Mount_Filesystem{Filesystem: &agentv1.GuestFilesystem{Type: "cgroup"}}
		case slices.Contains(podFiles, filepath.Clean(m.Destination)):
			file, err := p.podFile(m)
			if err != nil {
				return nil, err
			}
			copied += len(file.Content)
			g.Source = &agentv1.Mount_File{File: file}
		case apart(p.cfg.Config) != "":
			made, reason, err := p.attachApart(ctx, c, m)
			if err != nil {
				return nil, err
			}
			if reason != "" {
				refused = append(refused, reason)
			}
			if made == nil || reason != "" {
				continue
			}
			copied += len(made.GetFile().GetContent())
			g = made
		default:
			if _, err := os.Stat(m.Source); err != nil {
				return nil, fmt.Errorf("bind mount of %s at %s: %w", m.Source, m.Destination, err)
			}
			if reason := unshareable(m); reason != "" {
				refused = append(refused, reason)
				continue
			}
			shared, err := p.shareFolder(ctx, c, m.Source, slices.Contains(m.Options, "ro"))
			if err != nil {
				return nil, fmt.Errorf("share %s with the guest: %w", m.Source, err)
			}
			g.Source = &agentv1.Mount_Shared{Shared: shared}
		}
		out = append(out, g)
	}
	if copied > wire.MaxFileCopies {
		refused = append(refused, fmt.Sprintf("%d bytes of files to copy; the limit is %d", copied, wire.MaxFileCopies))
	}
	if len(refused) > 0 {
		return nil, &RefusedError{Reasons: refused}
	}
	return out, nil
}

// isLive reports whether a mount brings a file or folder of the host that the guest is to see as it changes.
func isLive(m specs.Mount) bool {
	destination := filepath.Clean(m.Destination)
	return isBind(m) && destination != "/dev/shm" && !slices.Contains(podFiles, destination) &&
		!strings.HasPrefix(filepath.Clean(m.Source), "/sys/fs/cgroup")
}

// unshareable tells why what a live mount brings cannot be shared with a VM; "" if it can, or is not there.
func unshareable(m specs.Mount) string {
	info, err := os.Stat(m.Source)
	if err != nil || info.IsDir() || info.Mode().IsRegular() {
		return ""
	}
	return fmt.Sprintf("%s of the host (%s) at %s: only files and folders can be shared with a VM, not devices, sockets or pipes",
		m.Source, info.Mode().Type(), m.Destination)
}

// guestOptions leaves out the words that only say where a mount comes from.
func guestOptions(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return o == "bind" || o == "rbind" || o == "loop"
	})
}

// podFiles are the files that containerd and nerdctl make for each container. They are small and copied: programs in
// the guest may rewrite them as they may in any container.
var podFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// podShm is where containers that share the pod's ipc namespace have its shared memory.
const podShm = "/dev/shm"

// podFile reads the host's file, or writes one from the pod's configuration where there is none (PodConfig.OwnFiles).
func (p *Pod) podFile(m specs.Mount) (*agentv1.FileCopy, error) {
	file, err := readFileCopy(m)
	if errors.Is(err, fs.ErrNotExist) {
		return &agentv1.FileCopy{Content: p.generatedFile(filepath.Clean(m.Destination)), Mode: 0o644}, nil
	}
	return file, err
}

func (p *Pod) generatedFile(destination string) []byte {
	var b strings.Builder
	switch destination {
	case "/etc/hostname":
		fmt.Fprintln(&b, p.cfg.Hostname)
	case "/etc/resolv.conf":
		if len(p.cfg.DNS.Servers)+len(p.cfg.DNS.Searches)+len(p.cfg.DNS.Options) == 0 {
			// No DNS settings: the pod gets the node's, as with containerd's own sandboxes.
			host, err := os.ReadFile("/etc/resolv.conf")
			if err == nil && len(host) <= wire.MaxFileCopy {
				return host
			}
		}
		if len(p.cfg.DNS.Searches) > 0 {
			fmt.Fprintf(&b, "search %s\n", strings.Join(p.cfg.DNS.Searches, " "))
		}
		for _, s := range p.cfg.DNS.Servers {
			fmt.Fprintf(&b, "nameserver %s\n", s)
		}
		if len(p.cfg.DNS.Options) > 0 {
			fmt.Fprintf(&b, "options %s\n", strings.Join(p.cfg.DNS.Options, " "))
		}
	case "/etc/hosts":
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
		for _, addr := range p.addresses() {
			fmt.Fprintf(&b, "%s\t%s\n", addr, p.cfg.Hostname)
		}
	}
	return []byte(b.String())
}

// shareFolder puts a folder or file of the host into the pod's virtio-fs share, which is made with the first one.
func (p *Pod) shareFolder(ctx context.Context, c *Container, path string, readonly bool) (*agentv1.SharedPath, error) {
	s, err := p.sharing(ctx)
	if err != nil {
		return nil, err
	}
	name, err := s.Add(ctx, path, readonly)
	if err != nil {
		return nil, err
	}
	c.cleanup.add(func(ctx context.Context) {
		if err := s.Remove(ctx, name); err != nil {
			log.G(ctx).WithError(err).WithField("path", path).Debug("take a folder out of the share")
		}
	})
	return &agentv1.SharedPath{Tag: shareTag, Name: name}, nil
}

// sharing starts virtiofsd and plugs the device in, once a pod. Other containers wait meanwhile; one that fails leaves
// the next to try again.
func (p *Pod) sharing(ctx context.Context) (*share.Share, error) {
	select {
	case p.shareTurn <- struct{}{}:
		defer func() { <-p.shareTurn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p.share != nil {
		return p.share, nil
	}
	vm, g := p.machine(), p.agent()
	if vm == nil || g == nil {
		return nil, p.lostError()
	}
	virtiofsd, err := p.cfg.Config.VirtiofsdPath()
	if err != nil {
		return nil, err
	}
	s, err := share.Start(ctx, share.Config{Virtiofsd: virtiofsd, StateDir: p.stateDir})
	if err != nil {
		return nil, err
	}
	if p.cgroup != nil {
		if err := p.cgroup.AddProcess(ctx, s.PID()); err != nil {
			log.G(ctx).WithError(err).Warn("put virtiofsd into the pod's cgroup")
		}
	}
	plug, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Hotplug)
	defer cancel()
	err = vm.AddSharedFolder(plug, hypervisor.SharedFolder{ID: "share0", Tag: shareTag, Socket: s.Socket()})
	if err == nil {
		_, err = callLong(plug, g.rpc.MountShared, &agentv1.MountSharedRequest{Tag: shareTag})
	}
	if err != nil {
		_ = s.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	p.share = s
	p.goTracked(func(ctx context.Context) { p.watchShare(ctx, vm, s) })
	return s, nil
}

// shareGrace is how long the VMM may take to be seen as gone after its virtiofsd, which ends with it.
const shareGrace = 2 * time.Second

// watchShare ends the pod when virtiofsd has ended: the guest would wait for ever for what it asked last, and
// virtio-fs has no way to come back.
func (p *Pod) watchShare(ctx context.Context, vm hypervisor.VM, s *share.Share) {
	select {
	case <-s.Done():
	case <-ctx.Done():
		return
	}
	timer := time.NewTimer(shareGrace)
	defer timer.Stop()
	select {
	case <-vm.Done(): // the cause, and not virtiofsd; its end tells more
	case <-ctx.Done():
	case <-timer.C:
		err := fmt.Errorf("the host's folders are lost to the guest: %w", s.Err())
		log.G(ctx).WithError(err).WithField("sandbox", p.cfg.ID).Error("the sandbox ends")
		p.end(Exit{Status: statusLost, At: time.Now(), Err: err}, false)
	}
}

// closeShare ends virtiofsd at the pod's end, when nobody makes a share any more.
func (p *Pod) closeShare(ctx context.Context) {
	if p.share == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.cfg.Config.Timeouts.Cleanup)
	defer cancel()
	if err := p.share.Close(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("end virtiofsd")
	}
}
