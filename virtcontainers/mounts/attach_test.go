// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

func TestConfidentialMounts(t *testing.T) {
	set, g := newSet(t)
	k := newKubelet(t)
	secret := k.volume("secret", "s", map[string]string{"user": "u", "sub/key": "k"})
	empty := k.directory("volumes/kubernetes.io~empty-dir/e")
	require.NoError(t, os.Chmod(empty, 0o777|os.ModeSetgid))
	require.NoError(t, os.Chown(empty, 7, 8))
	log := k.file("containers/main/0123abcd", "what another container left")
	hosts := k.file("etc-hosts", "127.0.0.1 localhost")

	mounts, err := attach(t, set,
		specs.Mount{Type: "proc", Source: "proc", Destination: "/proc"},
		bind(secret, "/s", "rprivate", "rw"),
		bind(secret, "/again", "ro"),
		bind(filepath.Join(secret, "user"), "/user", "ro"),
		bind(empty, "/e", "rw"),
		bind(log, "/dev/termination-log", "rw"),
		bind(hosts, "/etc/hosts", "rw"),
	)
	require.NoError(t, err)
	require.Len(t, mounts, 7)
	require.Equal(t, "proc", mounts[0].GetFilesystem().GetType())
	require.Equal(t, &agentv1.PodVolume{Name: "s"}, mounts[1].GetVolume())
	require.Equal(t, []string{"rprivate", "ro"}, mounts[1].GetOptions(), "read-only whatever was asked for")
	require.Equal(t, "s", mounts[2].GetVolume().GetName())
	require.Equal(t, &agentv1.PodVolume{Name: "s", Path: "user"}, mounts[3].GetVolume())
	require.Equal(t, &agentv1.ScratchVolume{Name: "e", Mode: 0o2777, Uid: 7, Gid: 8}, mounts[4].GetScratch())
	require.Equal(t, []string{"rw"}, mounts[4].GetOptions())
	require.Empty(t, mounts[5].GetFile().GetContent(), "the file's own content does not go along")
	require.EqualValues(t, 0o666, mounts[5].GetFile().GetMode())
	require.Equal(t, "127.0.0.1 localhost", string(mounts[6].GetFile().GetContent()))
	require.Len(t, g.puts, 1, "one volume, copied once")
	require.True(t, g.puts[0].GetCommit())
	require.Len(t, g.puts[0].GetFiles(), 2)
	for _, m := range mounts {
		require.NotContains(t, m.String(), k.pod, "no path of the host goes to the guest")
		require.Nil(t, m.GetShared())
	}

	require.False(t, mounts[1].GetIdMapped())
	line := []specs.LinuxIDMapping{{HostID: 1000, Size: 65536}}
	for _, m := range []Mount{
		{Kind: Copied, Destination: "/s", Source: secret, Volume: volumes.Parse(secret)},
		{Kind: Scratch, Destination: "/e", Source: empty, Volume: volumes.Parse(empty)},
		{Kind: PodFile, Destination: "/etc/hosts", Source: hosts},
	} {
		m.IDs = idmap.Of(line, line)
		made, err := set.Attach(t.Context(), []Mount{m}, func(func(context.Context)) {})
		require.NoError(t, err)
		require.True(t, made[0].GetIdMapped(), m.Destination)
	}

	_, err = attach(t, set, bind(filepath.Join(secret, "none"), "/n"), bind("/srv", "/srv"))
	reasons, other := refusal.Reasons(err)
	require.NoError(t, other)
	require.Len(t, reasons, 2, "those of the mounts themselves too")
	require.Contains(t, reasons[0], "no such file in the volume")
}

func TestConfidentialVolumeThatBreaksALimit(t *testing.T) {
	set, _ := newSet(t)
	k := newKubelet(t)
	dir := k.volume("configmap", "cm", map[string]string{"a": "1"})
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "..2026", "pipe"), 0o600))
	_, err := attach(t, set, bind(dir, "/d"))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "pipe is neither a file nor a directory")
}

func TestScratchVolumeOfAFileSystemInMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	set, _ := newSet(t)
	k := newKubelet(t)
	mount := func(name, size string) Mount {
		dir := k.directory("volumes/kubernetes.io~empty-dir/" + name)
		require.NoError(t, unix.Mount("none", dir, "tmpfs", 0, "size="+size+",mode=1777"))
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		return Classify(bind(dir, "/d"), confidential)
	}
	got, err := set.scratch(mount("small", "16m"))
	require.NoError(t, err)
	require.EqualValues(t, 16<<20, got.Scratch.GetSizeBytes())
	require.EqualValues(t, 0o1777, got.Scratch.GetMode())
	got, err = set.scratch(mount("large", "4g"))
	require.NoError(t, err)
	require.Zero(t, got.Scratch.GetSizeBytes(), "a limit above the VM's memory is none")

	file := k.file("volumes/kubernetes.io~empty-dir/file", "")
	require.Contains(t, Refusals(planned(confidential, bind(file, "/d")))[0], "not a directory")
	link := filepath.Join(k.pod, "volumes/kubernetes.io~empty-dir/link")
	require.NoError(t, os.Symlink("/", link))
	require.Contains(t, Refusals(planned(confidential, bind(link, "/d")))[0], "not a directory")
}

func TestPartOfAVolumeIsCopiedOnce(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	set, g := newSet(t)
	k := newKubelet(t)
	secret := k.volume("configmap", "cm", map[string]string{"key": "value", "sub/a": "1"})
	k.file("volumes/kubernetes.io~empty-dir/e/f", "")
	part := func(index, volume, of string, directory bool) specs.Mount {
		at := filepath.Join(k.pod, "volume-subpaths", volume, "main", index)
		if directory {
			require.NoError(t, os.MkdirAll(at, 0o755))
		} else {
			k.file("volume-subpaths/"+volume+"/main/"+index, "")
		}
		require.NoError(t, unix.Mount(of, at, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
		return bind(at, "/"+index, "rw")
	}
	mounts, err := attach(t, set,
		part("0", "cm", filepath.Join(secret, "..2026/key"), false), part("1", "cm", filepath.Join(secret, "..2026/sub"), true),
	)
	require.NoError(t, err)
	require.Equal(t, "value", string(mounts[0].GetFile().GetContent()))
	require.Equal(t, []string{"ro"}, mounts[0].GetOptions())
	require.Len(t, g.puts, 1)
	require.Equal(t, g.puts[0].GetName(), mounts[1].GetVolume().GetName())
	require.Equal(t, "a", g.puts[0].GetFiles()[0].GetPath())

	reasons := Refusals(planned(confidential,
		part("2", "e", filepath.Join(k.pod, "volumes/kubernetes.io~empty-dir/e/f"), false),
		part("3", "cm", "/etc/passwd", false),
	))
	require.Len(t, reasons, 2)
	require.Contains(t, reasons[0], "is a file on the host")
	require.Contains(t, reasons[1], "in no volume of the pod that is called cm")
}

func TestVolumesOfTheImage(t *testing.T) {
	set, _ := newSet(t)
	top := filepath.Join(t.TempDir(), "io.containerd.grpc.v1.cri/containers")
	directory := func(container string) string {
		dir := filepath.Join(top, container, "volumes/0123")
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.Chmod(dir, 0o777|os.ModeSticky))
		return dir
	}
	attach := func(dir string, readonly bool) ([]*agentv1.Mount, error) {
		spec := &specs.Spec{Root: &specs.Root{Readonly: readonly}, Mounts: []specs.Mount{bind(dir, "/var/data", "rw")}}
		return set.Attach(t.Context(), Look(Plan(spec, confidential, false), confidential), nil)
	}
	// A container that crashes is made anew under another id, with another directory, again and again.
	for i := range 2 * wire.MaxVolumes {
		mounts, err := attach(directory(fmt.Sprint(i)), true)
		require.NoError(t, err)
		require.Equal(t, "tmpfs", mounts[0].GetFilesystem().GetType(), "it goes with the container")
		owner := []string{fmt.Sprintf("uid=%d", os.Getuid()), fmt.Sprintf("gid=%d", os.Getgid())}
		require.Equal(t, append([]string{"rw", "nosuid", "nodev", "mode=1777"}, owner...), mounts[0].GetOptions())
	}
	dir := directory("c")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "of-the-image"), nil, 0o600))
	mounts, err := attach(dir, false)
	require.NoError(t, err)
	require.Empty(t, mounts, "the image's files are in the root filesystem")
	_, err = attach(dir, true)
	require.ErrorContains(t, err, "read-only root filesystem")
	spec := &specs.Spec{Root: &specs.Root{Readonly: true}, Mounts: []specs.Mount{bind(dir, "/var/data", "rw")}}
	require.Len(t, Refusals(Look(Plan(spec, confidential, false), confidential)), 1, "before anything is made")
}

func TestPodFiles(t *testing.T) {
	set, _ := newSet(t)
	set.cfg.Files = PodFiles{
		Hostname: "h", Addresses: []netip.Addr{netip.MustParseAddr("10.1.2.3")},
		DNS: DNS{Servers: []string{"10.0.0.1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}},
	}
	made, err := set.Attach(t.Context(), Plan(&specs.Spec{}, confidential, true), nil)
	require.NoError(t, err)
	got := map[string]string{}
	for _, m := range made {
		require.EqualValues(t, 0o644, m.GetFile().GetMode())
		got[m.GetDestination()] = string(m.GetFile().GetContent())
	}
	require.Equal(t, map[string]string{
		"/etc/hostname": "h\n", "/etc/resolv.conf": "search a b\nnameserver 10.0.0.1\noptions ndots:5\n",
		"/etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n10.1.2.3\th\n",
	}, got)
}

func TestTooManyBytesOfFiles(t *testing.T) {
	set, _ := newSet(t)
	k := newKubelet(t)
	file := k.file("etc-hosts", strings.Repeat("x", wire.MaxFileCopy))
	var all []Mount
	for range wire.MaxFileCopies/wire.MaxFileCopy + 1 {
		all = append(all, Mount{Kind: PodFile, Source: file, Destination: "/etc/hosts"})
	}
	_, err := set.Attach(t.Context(), all, nil)
	require.ErrorContains(t, err, "bytes of files to copy")
}

// A virtiofsd that cannot be started is tried again by the next container; a source that has gone is an error, and no
// refusal.
func TestLiveMountsThatFail(t *testing.T) {
	set, _ := newSet(t)
	tries := 0
	set.cfg.Virtiofsd = func() (string, error) {
		tries++
		return "", errors.New("there is no virtiofsd")
	}
	dir := t.TempDir()
	for range 2 {
		_, err := set.Attach(t.Context(), planned(shares, bind(dir, "/d")), nil)
		require.ErrorContains(t, err, "share "+dir+" with the guest: there is no virtiofsd")
	}
	require.Equal(t, 2, tries)
	_, err := set.Attach(t.Context(), planned(shares, bind("/nowhere", "/d")), nil)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "bind mount of /nowhere at /d")
	_, err = set.Attach(t.Context(), []Mount{Classify(bind("/dev/null", "/d"), shares)}, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "it became a device after the look")

	set.turn <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = set.Attach(ctx, planned(shares, bind(dir, "/d")), nil)
	require.ErrorIs(t, err, context.Canceled, "whoever waits for another container's share may give up")
	<-set.turn
	set.Close(t.Context())
}
