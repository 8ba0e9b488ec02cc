// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/internal/idmap"
	"github.com/cloister-project/cloister/tee"
)

// Each rule of a confidential VM that the host tells of, with something that tries to get around it.
func TestConfidentialRules(t *testing.T) {
	k := newKubelet(t)
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer l.Close()
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink("/etc", link))
	for _, tc := range []struct {
		name  string
		mount specs.Mount
		want  string // "" is fine
	}{
		{"directory of the host", bind("/srv/data", "/data"), "/srv/data at /data (hostPath)"},
		{"read-only", bind("/srv/data", "/data", "ro"), "hostPath"},
		{"file of the host", bind("/etc/passwd", "/p"), "hostPath"},
		{"another type, same option", specs.Mount{Type: "none", Source: "/srv", Destination: "/d", Options: []string{"rbind"}}, "hostPath"},
		{"bind without r", specs.Mount{Type: "tmpfs", Source: "/srv", Destination: "/d", Options: []string{"bind"}}, "hostPath"},
		{"device node", bind("/dev/null", "/n"), "hostPath"},
		{"socket", bind(socket, "/run/s"), "hostPath"},
		{"containerd's socket", bind("/run/containerd/containerd.sock", "/c"), "hostPath"},
		{"by way of a link", bind(link, "/d"), "hostPath"},
		{"the pod's own directory", bind(k.pod, "/d"), "hostPath"},
		{"all its volumes", bind(filepath.Join(k.pod, "volumes"), "/d"), "hostPath"},
		{"out of a volume by dots", bind(k.pod+"/volumes/kubernetes.io~secret/s/../../../../..", "/d"), "hostPath"},
		{"hosts by another name", bind("/etc/hosts", "/etc/hosts.host"), "hostPath"},
		{"persistent volume", bind(k.pod+"/volumes/kubernetes.io~csi/pvc-1/mount", "/d"), "volume pvc-1 (kubernetes.io~csi) at /d"},
		{"local volume", bind(k.pod+"/volumes/kubernetes.io~local-volume/v", "/d"), "kubernetes.io~local-volume"},
		{"NFS", bind(k.pod+"/volumes/kubernetes.io~nfs/v", "/d"), "kubernetes.io~nfs"},
		{"hostPath volume in the kubelet's words", bind(k.pod+"/volumes/kubernetes.io~host-path/v", "/d"), "kubernetes.io~host-path"},
		{"part of an emptyDir that is a file", bind(k.file("volumes/kubernetes.io~empty-dir/e/sub", ""), "/d"), "is a file on the host"},
		{"part of a volume that is none", bind(k.file("volume-subpaths/v/main/0", ""), "/d"), "is no mount"},
		{"bidirectional", bind(k.pod+"/volumes/kubernetes.io~secret/s", "/d", "rshared"), "Bidirectional"},
		{"unknown filesystem", specs.Mount{Type: "nfs", Source: "srv:/x", Destination: "/d"}, "not known"},

		{"secret", bind(k.pod+"/volumes/kubernetes.io~secret/s", "/d"), ""},
		{"emptyDir", bind(k.pod+"/volumes/kubernetes.io~empty-dir/e", "/d"), ""},
		{"termination log", bind(k.pod+"/containers/main/0123abcd", "/dev/termination-log"), ""},
		{"hosts", bind(k.pod+"/etc-hosts", "/etc/hosts"), ""},
		{"shared memory", bind("/run/containerd/shm", "/dev/shm"), ""},
		{"cgroups", bind("/sys/fs/cgroup", "/sys/fs/cgroup"), ""},
		{"memory", specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/d"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			refused := Refusals(planned(confidential, tc.mount))
			if tc.want == "" {
				require.Empty(t, refused)
				return
			}
			require.Len(t, refused, 1)
			require.Contains(t, refused[0], tc.want)
			require.Contains(t, refused[0], tc.mount.Destination)
			require.Contains(t, refused[0], tc.mount.Source)
		})
	}
}

// What becomes of a mount, with its reason where it is refused: by its words alone, in a VM that shares the host's files
// and in one that does not.
func TestClassify(t *testing.T) {
	const pod = "/var/lib/kubelet/pods/0a1b2c3d-0000-4000-8000-00000000000a"
	for _, tc := range []struct {
		mount       specs.Mount
		live, apart Kind
	}{
		{specs.Mount{Type: "proc", Source: "proc", Destination: "/proc"}, GuestFilesystem, GuestFilesystem},
		{specs.Mount{Type: "cgroup", Source: "cgroup", Destination: "/sys/fs/cgroup"}, GuestFilesystem, GuestFilesystem},
		{specs.Mount{Type: "nfs", Source: "srv:/x", Destination: "/n"}, Refused, Refused},
		{specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "relative"}, Refused, Refused},
		{bind("relative", "/r"), Refused, Refused},
		{bind("/srv", "/s", "rshared"), Refused, Refused},
		{bind("/srv", "/s", "shared"), Refused, Refused},
		{bind("/run/containerd/shm", "/dev/shm/"), PodShm, PodShm},
		{bind("/sys/fs/cgroup/kubepods", "/sys/fs/cgroup"), CgroupView, CgroupView},
		{bind("/sys/fs/cgroups", "/c"), Live, Refused},
		{bind(pod+"/etc-hosts", "/etc//hosts"), PodFile, PodFile},
		{bind("/srv", "/s", "rslave"), Refused, Refused},
		{bind("/srv", "/s", "rprivate"), Live, Refused},
		{bind(pod+"/volumes/kubernetes.io~secret/s", "/s"), Copied, Copied},
		{bind(pod+"/volumes/kubernetes.io~configmap/c/key", "/s"), Copied, Copied},
		{bind(pod+"/volume-subpaths/c/main/0", "/s"), Part, Part},
		{bind(pod+"/volumes/kubernetes.io~empty-dir/e", "/e"), Scratch, Scratch},
		{bind(pod+"/volumes/kubernetes.io~empty-dir/e/sub", "/e"), Scratch, Scratch},
		{bind(pod+"/volumes/kubernetes.io~csi/v/mount", "/v"), Live, Refused},
		{bind(pod+"/containers/main/0123abcd", "/dev/termination-log"), Live, TerminationLog},
		{bind("/var/lib/containerd/io.containerd.grpc.v1.cri/containers/c/volumes/v", "/v"), Live, ImageVolume},
	} {
		for s, want := range map[Sharing]Kind{shares: tc.live, confidential: tc.apart, {}: tc.apart} {
			got := Classify(tc.mount, s)
			require.Equal(t, want, got.Kind, "%s at %s: %s", tc.mount.Source, tc.mount.Destination, got.Kind)
			require.Equal(t, want == Refused, got.Reason != "")
			require.NotContains(t, got.Options, "rbind")
		}
	}
	require.Equal(t, "refused", Refused.String())
	require.Equal(t, "volume of the image", ImageVolume.String())
}

func TestSharing(t *testing.T) {
	for _, name := range tee.Names() {
		s := SharingOf(name, hypervisor.ArchAMD64)
		require.Equal(t, name == tee.None, s.Live(), name)
		require.Equal(t, name == tee.None, s.Reason() == "", name)
	}
	other := SharingOf(tee.None, hypervisor.ArchS390X)
	require.False(t, other.Live())
	require.Contains(t, other.Reason(), "shares no files with the host")
	require.False(t, Sharing{}.Live(), "what nobody decided on is not shared")
	require.NotEmpty(t, Sharing{}.Reason())
}

func TestTooManyMounts(t *testing.T) {
	all := make([]specs.Mount, wire.MaxMounts+1)
	for i := range all {
		all[i] = specs.Mount{Type: "tmpfs", Destination: fmt.Sprint("/", i)}
	}
	want := fmt.Sprintf("%d mounts; the limit is %d", wire.MaxMounts+1, wire.MaxMounts)
	require.Equal(t, []string{want}, Refusals(planned(shares, all...)))
	require.Empty(t, Refusals(planned(shares, all[1:]...)))
}

// All that cannot be had is told at once, whether the specification shows it or the host's files do.
func TestLookFindsWhatCannotBeShared(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer l.Close()
	fine := []specs.Mount{
		bind(t.TempDir(), "/directory"), bind("/nowhere", "/missing"), bind(socket, "/etc/hosts"),
		{Type: "tmpfs", Source: socket, Destination: "/tmp"},
	}
	require.Empty(t, Refusals(planned(shares, fine...)))
	all := append(fine, bind(socket, "/one"), specs.Mount{Type: "nfs", Destination: "/n"}, bind("/dev/null", "/two"))
	require.Len(t, Refusals(Plan(&specs.Spec{Mounts: all}, shares, false)), 1, "nobody looked yet")
	reasons := Refusals(planned(shares, all...))
	require.Len(t, reasons, 3)
	require.Contains(t, reasons[0], socket+" of the host")
	require.Contains(t, reasons[1], "nfs")
	require.Contains(t, reasons[2], "/two: only files and directories")
}

func TestPlanAddsThePodsFiles(t *testing.T) {
	shm := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=65536k"}}
	hosts := specs.Mount{Destination: "/etc/hosts/", Type: "bind", Source: "/var/lib/kubelet/hosts", Options: []string{"rbind"}}
	for _, c := range []struct {
		name     string
		own      bool
		ipc      string
		readonly bool
		want     map[string]string // destination: kind, source, options
	}{
		{"containerd's sandboxer brings them", false, "/proc/7/ns/ipc", false,
			map[string]string{"/dev/shm": "guest file system shm size=65536k", "/etc/hosts/": "pod file /var/lib/kubelet/hosts "}},
		{"ours", true, "/proc/7/ns/ipc", false,
			map[string]string{"/dev/shm": "pod's shared memory  nosuid,noexec,nodev,rw", "/etc/hosts/": "pod file /var/lib/kubelet/hosts ",
				"/etc/hostname": "pod file  rprivate,rw", "/etc/resolv.conf": "pod file  rprivate,rw"}},
		{"read-only root", true, "/proc/7/ns/ipc", true,
			map[string]string{"/dev/shm": "pod's shared memory  nosuid,noexec,nodev,rw", "/etc/hosts/": "pod file /var/lib/kubelet/hosts ",
				"/etc/hostname": "pod file  rprivate,ro", "/etc/resolv.conf": "pod file  rprivate,ro"}},
		{"private ipc", true, "", false,
			map[string]string{"/dev/shm": "guest file system shm size=65536k", "/etc/hosts/": "pod file /var/lib/kubelet/hosts ",
				"/etc/hostname": "pod file  rprivate,rw", "/etc/resolv.conf": "pod file  rprivate,rw"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := &specs.Spec{
				Root: &specs.Root{Readonly: c.readonly}, Mounts: []specs.Mount{shm, hosts},
				Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: c.ipc}}},
			}
			got := map[string]string{}
			for _, m := range Plan(spec, shares, c.own) {
				got[m.Destination] = m.Kind.String() + " " + m.Source + " " + strings.Join(m.Options, ",")
			}
			require.Equal(t, c.want, got)
			require.Equal(t, []specs.Mount{shm, hosts}, spec.Mounts, "the caller's specification must not change")
		})
	}
}

func TestPlanOfUserNamespace(t *testing.T) {
	line := []specs.LinuxIDMapping{{HostID: 1000, Size: 65536}}
	other := []specs.LinuxIDMapping{{HostID: 7, Size: 65536}}
	ids := idmap.Of(line, line)
	withIDs := func(m specs.Mount, uids, gids []specs.LinuxIDMapping) specs.Mount {
		m.UIDMappings, m.GIDMappings = uids, gids
		return m
	}
	users := &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.UserNamespace}}, UIDMappings: line, GIDMappings: line}
	hosts := bind("/var/lib/kubelet/hosts", "/etc/hosts")
	for _, tc := range []struct {
		name  string
		linux *specs.Linux
		mount specs.Mount
		want  idmap.Map
		says  string // why it is refused
	}{
		{"mapped", users, withIDs(bind("/srv", "/d"), line, line), ids, ""},
		{"pod file", users, withIDs(hosts, line, line), ids, ""},
		{"by option", users, bind("/srv", "/d", "ro", "idmap"), ids, ""},
		{"not mapped", users, bind("/srv", "/d"), idmap.Map{}, ""},
		{"other ids", users, withIDs(bind("/srv", "/d"), other, line), idmap.Map{}, "uids 0:7:65536"},
		{"users only", users, withIDs(bind("/srv", "/d"), line, nil), idmap.Map{}, "container's user namespace"},
		{"no user namespace", &specs.Linux{UIDMappings: line, GIDMappings: line}, withIDs(bind("/srv", "/d"), line, line), idmap.Map{},
			"container's user namespace"},
		{"no user namespace, by option", nil, bind("/srv", "/d", "idmap"), idmap.Map{}, "no user namespace"},
		{"filesystem", users, withIDs(specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/d"}, line, line), idmap.Map{}, "volumes only"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := Plan(&specs.Spec{Linux: tc.linux, Mounts: []specs.Mount{tc.mount}}, shares, false)[0]
			require.Equal(t, tc.want, m.IDs)
			require.NotContains(t, m.Options, "idmap", "the guest is told in another way")
			require.Equal(t, tc.says == "", m.Kind != Refused)
			require.Contains(t, m.Reason, tc.says)
		})
	}
	for _, m := range Plan(&specs.Spec{Linux: users}, shares, true) {
		require.Equal(t, ids, m.IDs, "the pod's files")
	}
}
