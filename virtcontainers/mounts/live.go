// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/share"
)

// shareTag is the virtio-fs tag of the pod's one shared directory.
const shareTag = "cloister"

// live puts a directory or file of the host into the pod's virtio-fs share, which is made with the first one. What comes after the
// first are parts of it that are shared by themselves already, to be mounted on it.
func (s *Set) live(ctx context.Context, m Mount, undo func(step func(context.Context))) ([]*agentv1.Mount, error) {
	if err := shareable(m); err != nil {
		return nil, err
	}
	sh, err := s.sharing(ctx)
	if err != nil {
		return nil, fmt.Errorf("share %s with the guest: %w", m.Source, err)
	}
	place, err := sh.Add(ctx, m.Source, access(m.Options), m.IDs)
	if err != nil {
		return nil, fmt.Errorf("share %s with the guest: %w", m.Source, err)
	}
	undo(func(ctx context.Context) {
		if err := sh.Remove(ctx, place); err != nil {
			log.G(ctx).WithError(err).WithField("path", m.Source).Debug("take a directory out of the share")
		}
	})
	all := []*agentv1.Mount{sharedMount(m.Destination, m.Options, place)}
	for _, in := range place.Inside {
		all = append(all, sharedMount(filepath.Join(m.Destination, in.Path), m.Options, in.Place))
	}
	return all, nil
}

func sharedMount(destination string, options []string, p share.Place) *agentv1.Mount {
	return &agentv1.Mount{Destination: destination, Options: options, Source: &agentv1.Mount_Shared{Shared: &agentv1.SharedPath{
		Tag: shareTag, Name: p.Name, Path: p.Path, Inode: p.Inode, Submounts: p.Submounts,
	}}}
}

// access is what a mount's options ask for; as everywhere the last one counts.
func access(options []string) share.Access {
	a := share.Writable
	for _, o := range options {
		switch o {
		case "rw", "rrw":
			a = share.Writable
		case "ro":
			a = share.ReadOnly
		case "rro":
			a = share.RecursiveReadOnly
		}
	}
	return a
}

// sharing starts virtiofsd and plugs the device in, once a pod. Other containers wait meanwhile; one that fails leaves
// the next to try again.
func (s *Set) sharing(ctx context.Context) (*share.Share, error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.share != nil {
		return s.share, nil
	}
	virtiofsd, err := s.cfg.Virtiofsd()
	if err != nil {
		return nil, err
	}
	sh, err := share.Start(ctx, share.Config{Virtiofsd: virtiofsd, StateDir: s.cfg.StateDir})
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Adopt(ctx, sh.PID()); err != nil {
		log.G(ctx).WithError(err).Warn("put virtiofsd into the pod's cgroup")
	}
	if err := s.plug(ctx, sh); err != nil {
		_ = sh.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	s.share = sh
	s.cfg.Run(func(ctx context.Context) { s.watch(ctx, sh) })
	return sh, nil
}

// plug brings the device into the guest.
func (s *Set) plug(ctx context.Context, sh *share.Share) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Hotplug)
	defer cancel()
	if err := s.cfg.VM.AddSharedDirectory(ctx, hypervisor.SharedDirectory{ID: "share0", Tag: shareTag, Socket: sh.Socket()}); err != nil {
		return err
	}
	return s.cfg.Guest.MountShared(ctx, shareTag)
}

// shareGrace is how long the VMM may take to be seen as gone after its virtiofsd, which ends with it.
const shareGrace = 2 * time.Second

// watch calls Lost when virtiofsd has ended: the guest would wait for ever for what it asked last, and virtio-fs has
// no way to come back.
func (s *Set) watch(ctx context.Context, sh *share.Share) {
	select {
	case <-sh.Done():
	case <-ctx.Done():
		return
	}
	timer := time.NewTimer(shareGrace)
	defer timer.Stop()
	select {
	case <-s.cfg.VM.Done(): // the cause, and not virtiofsd; its end says more
	case <-ctx.Done():
	case <-timer.C:
		s.cfg.Lost(fmt.Errorf("the host's directories are lost to the guest: %w", sh.Err()))
	}
}

// Close ends virtiofsd at the pod's end, when nobody attaches mounts any more.
func (s *Set) Close(ctx context.Context) {
	if s.share == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Cleanup)
	defer cancel()
	if err := s.share.Close(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("end virtiofsd")
	}
}
