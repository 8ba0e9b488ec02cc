// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// testConfig is a configuration of a platform with what every one has.
func testConfig(name tee.Name) *configs.Config {
	return &configs.Config{Hypervisor: configs.Hypervisor{Kind: configs.KindQEMU, Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: string(name)}}
}

func testPlan(t *testing.T, cfg *configs.Config) *vmplan.Plan {
	t.Helper()
	plan, err := vmplan.New(vmplan.Pod{ID: "p", Config: cfg})
	require.NoError(t, err)
	return plan
}

// kubelet is a pod's folder as the kubelet lays it out.
type kubelet struct {
	t   *testing.T
	pod string
}

func newKubelet(t *testing.T) kubelet {
	return kubelet{t, filepath.Join(t.TempDir(), "pods", "0a1b2c3d-0000-4000-8000-00000000000a")}
}

// folder makes a folder of the pod.
func (k kubelet) folder(path string) string {
	dir := filepath.Join(k.pod, path)
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	return dir
}

// volume makes a volume as the AtomicWriter writes it.
func (k kubelet) volume(kind, name string, files map[string]string) string {
	dir := k.folder("volumes/kubernetes.io~" + kind + "/" + name)
	for file, content := range files {
		path := filepath.Join(dir, "..2026", file)
		require.NoError(k.t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(k.t, os.WriteFile(path, []byte(content), 0o640))
	}
	require.NoError(k.t, os.Symlink("..2026", filepath.Join(dir, "..data")))
	return dir
}

func (k kubelet) file(path, content string) string {
	path = filepath.Join(k.pod, path)
	require.NoError(k.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(k.t, os.WriteFile(path, []byte(content), 0o666))
	require.NoError(k.t, os.Chmod(path, 0o666))
	return path
}

func bind(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

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
		{"folder of the host", bind("/srv/data", "/data"), "/srv/data at /data (hostPath)"},
		{"read-only", bind("/srv/data", "/data", "ro"), "hostPath"},
		{"file of the host", bind("/etc/passwd", "/p"), "hostPath"},
		{"another type, same option", specs.Mount{Type: "none", Source: "/srv", Destination: "/d", Options: []string{"rbind"}}, "hostPath"},
		{"bind without r", specs.Mount{Type: "tmpfs", Source: "/srv", Destination: "/d", Options: []string{"bind"}}, "hostPath"},
		{"device node", bind("/dev/null", "/n"), "hostPath"},
		{"socket", bind(socket, "/run/s"), "hostPath"},
		{"containerd's socket", bind("/run/containerd/containerd.sock", "/c"), "hostPath"},
		{"by way of a link", bind(link, "/d"), "hostPath"},
		{"the pod's own folder", bind(k.pod, "/d"), "hostPath"},
		{"all its volumes", bind(filepath.Join(k.pod, "volumes"), "/d"), "hostPath"},
		{"out of a volume by dots", bind(k.pod+"/volumes/kubernetes.io~secret/s/../../../../..", "/d"), "hostPath"},
		{"hosts by another name", bind("/etc/hosts", "/etc/hosts.host"), "hostPath"},
		{"persistent volume", bind(k.pod+"/volumes/kubernetes.io~csi/pvc-1/mount", "/d"), "volume pvc-1 (kubernetes.io~csi) at /d"},
		{"local volume", bind(k.pod+"/volumes/kubernetes.io~local-volume/v", "/d"), "kubernetes.io~local-volume"},
		{"NFS", bind(k.pod+"/volumes/kubernetes.io~nfs/v", "/d"), "kubernetes.io~nfs"},
		{"hostPath volume in the kubelet's words", bind(k.pod+"/volumes/kubernetes.io~host-path/v", "/d"), "kubernetes.io~host-path"},
		{"part of an emptyDir", bind(k.pod+"/volumes/kubernetes.io~empty-dir/e/sub", "/d"), "mount the whole volume"},
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
			spec := &specs.Spec{Process: &specs.Process{}, Mounts: []specs.Mount{tc.mount}}
			_, err := planWhole(spec, PodConfig{}, "a confidential VM shares no files")
			if tc.want == "" {
				require.NoError(t, err)
				return
			}
			var refused *RefusedError
			require.ErrorAs(t, err, &refused)
			require.Len(t, refused.Reasons, 1)
			require.ErrorContains(t, err, tc.want)
			require.Contains(t, refused.Reasons[0], tc.mount.Destination)
			require.Contains(t, refused.Reasons[0], tc.mount.Source)
		})
	}
}

func TestConfidentialPodIsToldEverythingAtOnce(t *testing.T) {
	only := &specs.Spec{
		Process: &specs.Process{},
		Linux:   &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/kvm"}, {Path: "/dev/sda"}}},
		Mounts:  []specs.Mount{bind("/srv/one", "/1"), bind("/srv/two", "/2", "rshared"), bind("/etc/passwd", "/3")},
	}
	cfg := PodConfig{
		ID: "p", Network: NetworkHost, HostPID: true, HostIPC: true, Only: only,
		Config: &configs.Config{
			TEE: configs.TEE{Platform: string(tee.Sample)}, Log: configs.Log{DebugConsole: true},
			Hypervisor: configs.Hypervisor{KernelParams: []string{"cloister.tee=snp"}},
		},
	}
	_, err := NewPod(t.Context(), cfg)
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, word := range []string{
		"hostNetwork", "hostPID", "hostIPC", "log.debug_console", "cloister.tee=snp", "/dev/kvm, /dev/sda", "privileged_without_host_devices",
		"/srv/one at /1", "Bidirectional", "/etc/passwd at /3",
	} {
		require.ErrorContains(t, err, word)
	}
	require.Len(t, refused.Reasons, 9)
}

// volumeGuest is an agent that takes volumes.
type volumeGuest struct {
	agentv1.AgentService

	mu   sync.Mutex
	puts []*agentv1.PutVolumeRequest
}

func (g *volumeGuest) PutVolume(_ context.Context, r *agentv1.PutVolumeRequest) (*agentv1.PutVolumeResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.puts = append(g.puts, r)
	return &agentv1.PutVolumeResponse{}, nil
}

// confidentialPod is a pod that is ready, with an agent that takes volumes.
func confidentialPod(t *testing.T) (*Pod, *volumeGuest) {
	g := &volumeGuest{}
	life, end := context.WithCancel(t.Context())
	p := &Pod{
		cfg: PodConfig{ID: "p", Config: testConfig(tee.Sample), Hostname: "h"}, plan: testPlan(t, testConfig(tee.Sample)),
		state: PodReady, guest: &guest{rpc: g, timeout: 1 << 40}, life: life,
		doc: &hypervisor.Document{Memory: hypervisor.Memory{Bytes: 1 << 30}}, containers: map[string]*Container{},
	}
	p.volumes = volumes.NewSet(p.putVolume, p.goTracked)
	t.Cleanup(func() {
		end()
		p.tracked.Wait()
	})
	return p, g
}

func TestConfidentialMounts(t *testing.T) {
	p, g := confidentialPod(t)
	k := newKubelet(t)
	secret := k.volume("secret", "s", map[string]string{"user": "u", "sub/key": "k"})
	empty := k.folder("volumes/kubernetes.io~empty-dir/e")
	require.NoError(t, os.Chmod(empty, 0o777|os.ModeSetgid))
	require.NoError(t, os.Chown(empty, 7, 8))
	log := k.file("containers/main/0123abcd", "what another container left")
	hosts := k.file("etc-hosts", "127.0.0.1 localhost")

	c := &Container{id: "c", pod: p, spec: &specs.Spec{}}
	mounts, err := p.attachMounts(t.Context(), c, []specs.Mount{
		{Type: "proc", Source: "proc", Destination: "/proc"},
		bind(secret, "/s", "rprivate", "rw"),
		bind(secret, "/again", "ro"),
		bind(filepath.Join(secret, "user"), "/user", "ro"),
		bind(empty, "/e", "rw"),
		bind(log, "/dev/termination-log", "rw"),
		bind(hosts, "/etc/hosts", "rw"),
	})
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

	_, err = p.attachMounts(t.Context(), c, []specs.Mount{bind(filepath.Join(secret, "none"), "/n"), bind("/srv", "/srv")})
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	require.Len(t, refused.Reasons, 2, "those of the mounts themselves too")
	require.ErrorContains(t, err, "no such file in the volume")
}

func TestConfidentialVolumeThatBreaksALimit(t *testing.T) {
	p, _ := confidentialPod(t)
	k := newKubelet(t)
	dir := k.volume("configmap", "cm", map[string]string{"a": "1"})
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "..2026", "pipe"), 0o600))
	_, err := p.attachMounts(t.Context(), &Container{id: "c", pod: p, spec: &specs.Spec{}}, []specs.Mount{bind(dir, "/d")})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "pipe is neither a file nor a folder")
}

func TestScratchVolumeOfAFileSystemInMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	p, _ := confidentialPod(t)
	k := newKubelet(t)
	mount := func(name, size string) specs.Mount {
		dir := k.folder("volumes/kubernetes.io~empty-dir/" + name)
		require.NoError(t, unix.Mount("none", dir, "tmpfs", 0, "size="+size+",mode=1777"))
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		return bind(dir, "/d")
	}
	got, reason, err := p.scratchVolume(mount("small", "16m"))
	require.NoError(t, err)
	require.Empty(t, reason)
	require.EqualValues(t, 16<<20, got.Scratch.GetSizeBytes())
	require.EqualValues(t, 0o1777, got.Scratch.GetMode())
	got, _, err = p.scratchVolume(mount("large", "4g"))
	require.NoError(t, err)
	require.Zero(t, got.Scratch.GetSizeBytes(), "a limit above the VM's memory is none")

	file := k.file("volumes/kubernetes.io~empty-dir/file", "")
	_, reason, err = p.scratchVolume(bind(file, "/d"))
	require.NoError(t, err)
	require.Contains(t, reason, "not a folder")
	link := filepath.Join(k.pod, "volumes/kubernetes.io~empty-dir/link")
	require.NoError(t, os.Symlink("/", link))
	_, reason, err = p.scratchVolume(bind(link, "/d"))
	require.NoError(t, err)
	require.Contains(t, reason, "not a folder")
}

func TestPartOfAVolumeIsCopiedOnce(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	p, g := confidentialPod(t)
	k := newKubelet(t)
	secret := k.volume("configmap", "cm", map[string]string{"key": "value", "sub/a": "1"})
	k.file("volumes/kubernetes.io~empty-dir/e/f", "")
	part := func(index, volume, of string, folder bool) specs.Mount {
		at := filepath.Join(k.pod, "volume-subpaths", volume, "main", index)
		if folder {
			require.NoError(t, os.MkdirAll(at, 0o755))
		} else {
			k.file("volume-subpaths/"+volume+"/main/"+index, "")
		}
		require.NoError(t, unix.Mount(of, at, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
		return bind(at, "/"+index, "rw")
	}
	mounts, err := p.attachMounts(t.Context(), &Container{id: "c", pod: p, spec: &specs.Spec{}}, []specs.Mount{
		part("0", "cm", filepath.Join(secret, "..2026/key"), false), part("1", "cm", filepath.Join(secret, "..2026/sub"), true),
	})
	require.NoError(t, err)
	require.Equal(t, "value", string(mounts[0].GetFile().GetContent()))
	require.Equal(t, []string{"ro"}, mounts[0].GetOptions())
	require.Len(t, g.puts, 1)
	require.Equal(t, g.puts[0].GetName(), mounts[1].GetVolume().GetName())
	require.Equal(t, "a", g.puts[0].GetFiles()[0].GetPath())

	_, err = planWhole(&specs.Spec{Process: &specs.Process{}, Mounts: []specs.Mount{
		part("2", "e", filepath.Join(k.pod, "volumes/kubernetes.io~empty-dir/e/f"), false),
		part("3", "cm", "/etc/passwd", false),
	}}, PodConfig{}, "a confidential VM shares no files")
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	require.Len(t, refused.Reasons, 2)
	require.ErrorContains(t, err, "mount the whole volume")
	require.ErrorContains(t, err, "in no volume of the pod that is called cm")
}

func TestVolumesOfTheImage(t *testing.T) {
	p, _ := confidentialPod(t)
	top := filepath.Join(t.TempDir(), "io.containerd.grpc.v1.cri/containers")
	folder := func(container string) string {
		dir := filepath.Join(top, container, "volumes/0123")
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.Chmod(dir, 0o777|os.ModeSticky))
		return dir
	}
	attach := func(dir string, readonly bool) ([]*agentv1.Mount, error) {
		c := &Container{id: "c", pod: p, spec: &specs.Spec{Root: &specs.Root{Readonly: readonly}}}
		return p.attachMounts(t.Context(), c, []specs.Mount{bind(dir, "/var/data", "rw")})
	}
	// A container that crashes is made anew under another id, with another folder, again and again.
	for i := range 2 * wire.MaxVolumes {
		mounts, err := attach(folder(fmt.Sprint(i)), true)
		require.NoError(t, err)
		require.Equal(t, "tmpfs", mounts[0].GetFilesystem().GetType(), "it goes with the container")
		require.Equal(t, []string{"rw", "nosuid", "nodev", "mode=1777", fmt.Sprintf("uid=%d", os.Getuid()), fmt.Sprintf("gid=%d", os.Getgid())},
			mounts[0].GetOptions())
	}
	dir := folder("c")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "of-the-image"), nil, 0o600))
	mounts, err := attach(dir, false)
	require.NoError(t, err)
	require.Empty(t, mounts, "the image's files are in the root filesystem")
	_, err = attach(dir, true)
	require.ErrorContains(t, err, "read-only root filesystem")
}

// What is wrong with the only container is told before its VM starts, on every platform.
func TestOnlyContainerIsCheckedWithItsPod(t *testing.T) {
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		cfg := PodConfig{ID: "p", Config: testConfig(name), Only: &specs.Spec{
			Process: &specs.Process{}, Linux: &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/sda"}}},
			Mounts: []specs.Mount{bind("/dev/null", "/null")},
		}}
		_, err := NewPod(t.Context(), cfg)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "/dev/sda")
		require.ErrorContains(t, err, "/dev/null")
		cfg.Only = &specs.Spec{}
		_, err = NewPod(t.Context(), cfg)
		require.ErrorContains(t, err, "no process")
	}
}
