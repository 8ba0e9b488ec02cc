// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestConfidential runs a pod with all rules of a confidential VM, and none of its protection: the sample platform.
func TestConfidential(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSample})
	t.Run("status", func(t *testing.T) { checkSampleStatus(t, pod) })
	t.Run("guest", func(t *testing.T) { checkConfidentialGuest(t, pod) })
	t.Run("container", func(t *testing.T) { checkContainer(t, pod) })
	t.Run("stats", func(t *testing.T) { checkConfidentialStats(t, pod) })
	t.Run("volumes", func(t *testing.T) { checkConfidentialVolumes(t, pod) })
	t.Run("scratch", func(t *testing.T) { checkScratchVolumes(t, pod) })
	t.Run("refusals", func(t *testing.T) { checkConfidentialRefusals(t, pod) })
	t.Run("disk", func(t *testing.T) { checkEncryptedDisk(t, n, pod, hostArch()) })
}

// TestOrdinaryPodSaysSo: nobody takes an ordinary VM for a confidential one.
func TestOrdinaryPodSaysSo(t *testing.T) {
	pod := runPod(t, sharedNode(t), harness.PodSpec{})
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, info["tee"], "none (the host can read this VM's memory)")
	assert.NotContains(t, info, "launchMeasurement")
	c := runContainer(t, pod, harness.ContainerSpec{})
	assert.NotContains(t, output(t, c, "cat /proc/cmdline"), "cloister.tee")
}

// TestLoneContainerIsRefusedBeforeItsVM: what `ctr run` asks for is known before its VM starts, so that a refusal costs no
// boot. A program in QEMU's place notes each VM.
func TestLoneContainerIsRefusedBeforeItsVM(t *testing.T) {
	n := sharedNode(t)
	dir := t.TempDir()
	started, qemu := filepath.Join(dir, "started"), filepath.Join(dir, "qemu")
	script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *-kernel*) echo vm >> %q ;; esac\nexec %q \"$@\"\n", started, n.Artifacts().QEMU)
	require.NoError(t, os.WriteFile(qemu, []byte(script), 0o755))
	withSettings(t, n, fmt.Sprintf("[hypervisor]\npath = %q\n", qemu))
	mount := "type=bind,src=/dev/null,dst=/null,options=rbind:ro"
	r := run(t, n.Ctr(testContext(t), ctrRun(n, "--rm", "--device", "/dev/loop-control", "--mount", mount, harness.BusyboxImage, "refused",
		"true")...))
	assert.NotZero(t, r.status)
	requireContains(t, r.stderr, "/dev/loop-control", "/dev/null of the host", "at /null")
	assert.NoFileExists(t, started)
	requireNothingLeft(t, n)

	assert.Equal(t, "runs", succeed(t, n.Ctr(testContext(t), ctrRun(n, "--rm", harness.BusyboxImage, "fine", "echo", "runs")...)))
	assert.FileExists(t, started, "the program in QEMU's place was used")
}

func checkSampleStatus(t *testing.T, pod *harness.Pod) {
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, info["tee"], "sample")
	assert.Contains(t, info["tee"], "NO PROTECTION")
	assert.NotContains(t, info, "launchMeasurement", "there is no hardware to measure anything")
	assert.NotContains(t, info, "initdata")
}

// checkConfidentialGuest looks at what the guest's kernel was started with and has.
func checkConfidentialGuest(t *testing.T, pod *harness.Pod) {
	c := runContainer(t, pod, harness.ContainerSpec{})
	cmdline := strings.Fields(output(t, c, "cat /proc/cmdline"))
	assert.Contains(t, cmdline, "cloister.tee=sample")
	assert.Contains(t, cmdline, "random.trust_bootloader=off")
	assert.Regexp(t, `(^| )swiotlb=[1-9][0-9]*,force( |$)`, strings.Join(cmdline, " "))
	for _, p := range cmdline {
		assert.False(t, strings.HasPrefix(p, "cloister.debug"), p)
	}

	// One line a virtio device: its type, and its feature bits as the kernel took them (VIRTIO 1.2, sections 5 and 6).
	devices := output(t, c, "for d in /sys/bus/virtio/devices/*; do echo $(cat $d/device $d/features); done")
	types := map[string]int{}
	for line := range strings.Lines(devices) {
		var kind, features string
		_, err := fmt.Sscan(line, &kind, &features)
		require.NoError(t, err, line)
		types[kind]++
		require.Len(t, features, 64, line)
		assert.Equal(t, "1", features[32:33], "VIRTIO_F_VERSION_1 of device type %s", kind)
		assert.Equal(t, "1", features[33:34], "VIRTIO_F_ACCESS_PLATFORM of device type %s", kind)
	}
	t.Logf("virtio devices by type: %v", types)
	for kind, name := range map[string]string{"0x0004": "entropy", "0x0005": "balloon", "0x0018": "memory", "0x001a": "file system",
		"0x001b": "pmem"} {
		assert.Zero(t, types[kind], "virtio %s device", name)
	}
	assert.NotZero(t, types["0x0001"], "network")
	assert.NotZero(t, types["0x0013"], "vsock")
	assert.NotContains(t, output(t, c, "cat /proc/self/mountinfo"), "virtiofs")
}

func checkConfidentialStats(t *testing.T, pod *harness.Pod) {
	c := runContainer(t, pod, harness.ContainerSpec{})
	stats, err := c.Stats(testContext(t))
	require.NoError(t, err)
	assert.NotZero(t, stats.GetCpu().GetUsageCoreNanoSeconds().GetValue())
	assert.NotZero(t, stats.GetMemory().GetWorkingSetBytes().GetValue())
}

// kubeletPod is a pod's directory as the kubelet has it.
type kubeletPod struct {
	t    *testing.T
	dir  string
	turn int
}

func newKubeletPod(t *testing.T, pod *harness.Pod) *kubeletPod {
	return &kubeletPod{t: t, dir: filepath.Join(t.TempDir(), "pods", pod.Config.GetMetadata().GetUid())}
}

func (k *kubeletPod) directory(path string) string {
	dir := filepath.Join(k.dir, path)
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	return dir
}

// volume writes a volume, or changes it, as the kubelet's AtomicWriter does: a new directory, a link's rename, the old
// directory's end.
func (k *kubeletPod) volume(kind, name string, files map[string]string) string {
	dir := k.directory("volumes/kubernetes.io~" + kind + "/" + name)
	k.turn++
	now := fmt.Sprintf("..2026_01_02_03_04_05.%09d", k.turn)
	for file, content := range files {
		path := filepath.Join(dir, now, file)
		require.NoError(k.t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(k.t, os.WriteFile(path, []byte(content), 0o644))
		top, _, _ := strings.Cut(file, "/")
		_ = os.Symlink("..data/"+top, filepath.Join(dir, top)) // there already after the first time
	}
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(k.t, os.Symlink(now, filepath.Join(dir, "..data_tmp")))
	require.NoError(k.t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	if old != "" {
		require.NoError(k.t, os.RemoveAll(filepath.Join(dir, old)))
	}
	return dir
}

func checkConfidentialVolumes(t *testing.T, pod *harness.Pod) {
	k := newKubeletPod(t, pod)
	large := strings.Repeat("0123456789abcdef", 100_000) // more than one message holds
	config := k.volume("configmap", "settings", map[string]string{"mode": "old", "pair": "old", "sub/file": "deep"})
	secret := k.volume("secret", "key", map[string]string{"token": "s3cret", "large": large})
	termination := filepath.Join(k.directory("containers/main"), "0a1b2c3d")
	require.NoError(t, os.WriteFile(termination, []byte("of an earlier container"), 0o666))
	require.NoError(t, os.Chmod(termination, 0o666))

	mounts := []*runtimeapi.Mount{
		{HostPath: config, ContainerPath: "/settings", Readonly: true},
		{HostPath: filepath.Join(config, "mode"), ContainerPath: "/one", Readonly: true},
		{HostPath: secret, ContainerPath: "/key"},
		{HostPath: termination, ContainerPath: "/dev/termination-log"},
	}
	one := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts})
	two := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts[:1]})
	for _, c := range []*harness.Container{one, two} {
		assert.Equal(t, "old\ndeep", output(t, c, "cat /settings/mode; echo; cat /settings/sub/file"))
	}
	assert.Equal(t, "s3cret", output(t, one, "cat /key/token"))
	assert.Equal(t, itoa(int64(len(large))), output(t, one, "cat /key/large | wc -c"))
	assert.Equal(t, "old", output(t, one, "cat /one"))
	assert.NotContains(t, output(t, one, "cat /proc/self/mountinfo"), k.dir, "no path of the host")

	for _, script := range []string{"echo x > /settings/mode", "touch /settings/new", "rm /key/token", "echo x > /one"} {
		result, err := one.Exec(testContext(t), "sh", "-c", script)
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode, script)
	}

	// The container looks at both files all the time; it must never see one of each update.
	watcher := runContainer(t, pod, harness.ContainerSpec{
		Mounts: mounts[:1],
		Script: `while :; do d=$(readlink -f /settings/..data 2>/dev/null || echo /settings)
m=$(cat $d/mode 2>/dev/null) && p=$(cat $d/pair 2>/dev/null) || continue
[ "$m" = "$p" ] || { echo "mixed $m $p"; exit 1; }
[ "$m" = new ] && { echo whole; exit 0; }; done`,
	})
	k.volume("configmap", "settings", map[string]string{"mode": "new", "pair": "new", "added": "yes"})
	status, err := watcher.Wait(testContext(t))
	require.NoError(t, err)
	stdout, _, err := watcher.Log()
	require.NoError(t, err)
	assert.Zero(t, status.GetExitCode(), stdout)
	for _, c := range []*harness.Container{one, two} {
		assert.Equal(t, "new\nyes", output(t, c, "cat /settings/mode; echo; cat /settings/added"))
		result, err := c.Exec(testContext(t), "cat", "/settings/sub/file")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode, "it is gone with the update")
	}
	assert.Equal(t, "old", output(t, one, "cat /one"), "a single file stays as it is")

	message := func() string {
		b, err := os.ReadFile(termination)
		require.NoError(t, err)
		return string(b)
	}
	output(t, one, "[ ! -s /dev/termination-log ] && echo because > /dev/termination-log")
	assert.Equal(t, "of an earlier container", message(), "it comes with the exit")
	require.NoError(t, one.Stop(testContext(t), 0))
	_, err = one.Wait(testContext(t))
	require.NoError(t, err)
	assert.Equal(t, "because\n", message())
}

// checkScratchVolumes: an emptyDir is the guest's own, and its containers'.
func checkScratchVolumes(t *testing.T, pod *harness.Pod) {
	k := newKubeletPod(t, pod)
	dir := k.directory("volumes/kubernetes.io~empty-dir/scratch")
	require.NoError(t, os.Chmod(dir, 0o777))
	mounts := []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/scratch"}}
	one := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts})
	two := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts})
	output(t, one, "echo shared > /scratch/file")
	assert.Equal(t, "shared", output(t, two, "cat /scratch/file"))
	assert.Equal(t, "drwxrwxrwx", strings.Fields(output(t, two, "ls -ld /scratch"))[0])
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, entries, "nothing of it reaches the host")
	require.NoError(t, one.Remove(testContext(t)))
	again := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts})
	assert.Equal(t, "shared", output(t, again, "cat /scratch/file"), "it lives as long as the pod")
}

// checkConfidentialRefusals: one error tells everything that cannot be had, and the pod lives on.
func checkConfidentialRefusals(t *testing.T, pod *harness.Pod) {
	k := newKubeletPod(t, pod)
	volume := k.directory("volumes/kubernetes.io~csi/pvc-1/mount")
	directory := t.TempDir()
	c, err := pod.Create(testContext(t), harness.ContainerSpec{
		Script: idle,
		Mounts: []*runtimeapi.Mount{
			{HostPath: directory, ContainerPath: "/directory", Readonly: true},
			{HostPath: "/etc/passwd", ContainerPath: "/etc/passwd"},
			{HostPath: volume, ContainerPath: "/data"},
		},
		Change: func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/loop-control", ContainerPath: "/dev/loop-control", Permissions: "rwm"}}
		},
	})
	require.NoError(t, err)
	cleanup(t, "removing the container", c.Remove)
	err = c.Start(testContext(t))
	require.Error(t, err)
	t.Logf("the error: %v", err)
	requireContains(t, err.Error(),
		directory+" at /directory (hostPath)", "/etc/passwd at /etc/passwd (hostPath)", "volume pvc-1 (kubernetes.io~csi) at /data",
		"/dev/loop-control", "a ConfigMap, a Secret or an emptyDir")
	runContainer(t, pod, harness.ContainerSpec{})
}
