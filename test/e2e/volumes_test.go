// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestVolumes is about volumes that are a pod's own, in an ordinary pod whose memory is smaller than what it writes.
func TestVolumes(t *testing.T) {
	n := sharedNode(t)
	const settings = "[sizing]\ndefault_memory_mib = 256\nfree_page_reporting = true\n[scratch]\nsize_mib = 1024\n"
	require.NoError(t, n.WriteDropIn("volumes", settings))
	cleanup(t, "the settings", func(context.Context) error { return n.RemoveDropIn("volumes") })
	image := toolImage(t, n, hostArch(), "volumeprobe")
	pod := runPod(t, n, harness.PodSpec{})
	k := newKubeletPod(t, pod)
	config := k.volume("configmap", "settings", map[string]string{"mode": "old"})
	empty := k.directory("volumes/kubernetes.io~empty-dir/scratch")
	require.NoError(t, os.Chmod(empty, 0o777))
	part := k.directory("volumes/kubernetes.io~empty-dir/scratch/of/it")
	container := func(script string) *harness.Container {
		return runContainer(t, pod, harness.ContainerSpec{Image: image, Script: script, Mounts: []*runtimeapi.Mount{
			{HostPath: config, ContainerPath: "/settings", Readonly: true},
			{HostPath: empty, ContainerPath: "/scratch"},
			{HostPath: part, ContainerPath: "/part"},
		}})
	}
	one, two := container(idle), container(idle)

	// First, while the guest's memory is in large pieces: it reports those of 2 MiB.
	t.Run("free memory goes back to the host", func(t *testing.T) {
		assert.Empty(t, output(t, one, "volumeprobe write /scratch/cached 140"))
		full := sharedMemory(t, n)
		var now int
		defer func() {
			t.Logf("QEMU held %d KiB of the guest's memory, and %d KiB after 140 MiB of cache were freed", full, now)
		}()
		output(t, one, "rm /scratch/cached")
		// Less than what was freed: some of it had been used at boot, and was not reported yet when the cache took it.
		waitFor(t, testContext(t), "the guest reports its free memory", func() bool {
			now = sharedMemory(t, n)
			return now < full-48<<10
		})
	})
	t.Run("an emptyDir is one object", func(t *testing.T) {
		assert.Equal(t, output(t, one, "stat -c %d:%i /scratch"), output(t, two, "stat -c %d:%i /scratch"))
		output(t, one, "echo shared > /scratch/file; mkfifo /scratch/fifo; echo part > /part/file; "+
			"(echo through > /scratch/fifo) > /dev/null 2>&1 &")
		assert.Equal(t, "shared\npart", output(t, two, "cat /scratch/file /scratch/of/it/file"))
		assert.Equal(t, "through", output(t, two, "cat /scratch/fifo"))
		assert.Empty(t, output(t, two, "mount | grep 'on /scratch type virtiofs' || true"))
		assert.Len(t, entries(t, empty), 1, "nothing of it reaches the host, which has the part's directory")
		assert.Empty(t, entries(t, part))
	})
	t.Run("sockets and locks", func(t *testing.T) {
		listener := container("exec volumeprobe listen /scratch/socket")
		waitFor(t, testContext(t), "the socket", func() bool { return output(t, two, "ls /scratch | grep -c socket || true") == "1" })
		assert.Equal(t, "hello", output(t, two, "volumeprobe dial /scratch/socket"))
		require.NoError(t, listener.Remove(testContext(t)))
		holder := container("sleep 3600 | volumeprobe lock /scratch/lock")
		waitFor(t, testContext(t), "the lock is held", func() bool {
			stdout, _, err := holder.Log()
			return err == nil && strings.Contains(stdout, "locked")
		})
		busy := output(t, two, "volumeprobe lock /scratch/lock < /dev/null || true")
		assert.Equal(t, "busy: resource temporarily unavailable, resource temporarily unavailable", busy)
		require.NoError(t, holder.Remove(testContext(t)))
		assert.Equal(t, "locked", output(t, two, "volumeprobe lock /scratch/lock < /dev/null"))
	})
	t.Run("a ConfigMap tells of its changes", func(t *testing.T) {
		watcher := container("exec volumeprobe watch /settings")
		waitFor(t, testContext(t), "the watch", func() bool {
			stdout, _, err := watcher.Log()
			return err == nil && strings.Contains(stdout, "watching")
		})
		k.volume("configmap", "settings", map[string]string{"mode": "new"})
		status, err := watcher.Wait(testContext(t))
		require.NoError(t, err)
		assert.Zero(t, status.GetExitCode())
		assert.Equal(t, "new", output(t, one, "cat /settings/mode"))
	})
	t.Run("usage", func(t *testing.T) { checkUsage(t, pod, one, "scratch", "/scratch") })
	t.Run("the host can read it", func(t *testing.T) {
		output(t, one, "for i in $(seq 1000); do echo '"+diskMarker+"'$i; done > /scratch/marker; sync")
		assert.True(t, hostSees(t, n, diskMarker+"7"), "as it says; the test of a confidential pod's disk looks the same way")
	})
	t.Run("more than the guest's memory", func(t *testing.T) {
		assert.Empty(t, output(t, one, "volumeprobe write /scratch/big 400"))
		assert.Empty(t, output(t, one, "volumeprobe write /root/big 400"), "in the writable layer")
		assert.Equal(t, "write /scratch/more: no space left on device", output(t, one, "volumeprobe write /scratch/more 400 || true"))
		full := diskKiB(t, n)
		output(t, one, "rm /scratch/big /scratch/more; sync")
		waitFor(t, testContext(t), "the host's disk gets back what is deleted", func() bool { return diskKiB(t, n) < full-300<<10 })
		assert.Empty(t, output(t, two, "volumeprobe write /scratch/again 400"))
		assert.Equal(t, "ext4", output(t, one, "stat -f -c %T /scratch | sed 's:ext2/ext3:ext4:'"))
	})
	t.Run("the disk has no name", func(t *testing.T) {
		assert.Empty(t, entries(t, filepath.Join(n.Dir, "scratch")), "so that it goes with the VM, whatever ends that")
	})
}

// checkUsage: what containers write shows in the pod's status, which is the one place that containerd has for it.
func checkUsage(t *testing.T, pod *harness.Pod, c *harness.Container, volume, at string) {
	type usage struct{ UsedBytes, LimitBytes, UsedInodes int64 }
	look := func() (disk, layer, dir usage) {
		_, info, err := pod.Status(testContext(t))
		require.NoError(t, err)
		var all struct {
			ScratchDisk               usage
			WritableLayers, EmptyDirs map[string]usage
		}
		require.NoError(t, json.Unmarshal([]byte(info["storageUsage"]), &all), "%v", info)
		require.Contains(t, all.WritableLayers, c.ID)
		require.Contains(t, all.EmptyDirs, volume)
		return all.ScratchDisk, all.WritableLayers[c.ID], all.EmptyDirs[volume]
	}
	disk, layer, dir := look()
	assert.Greater(t, disk.LimitBytes, int64(900*mib))
	output(t, c, "head -c 3000000 /dev/zero > /root/three; head -c 5000000 /dev/zero > "+at+"/five; touch "+at+"/empty; sync")
	diskNow, layerNow, dirNow := look()
	assert.InDelta(t, 3000000, layerNow.UsedBytes-layer.UsedBytes, 64<<10)
	assert.InDelta(t, 5000000, dirNow.UsedBytes-dir.UsedBytes, 64<<10)
	assert.GreaterOrEqual(t, diskNow.UsedBytes-disk.UsedBytes, int64(8000000))
	assert.EqualValues(t, 2, dirNow.UsedInodes-dir.UsedInodes)
	assert.Positive(t, layerNow.UsedInodes-layer.UsedInodes)
	output(t, c, "rm /root/three "+at+"/five "+at+"/empty")
	_, layerNow, dirNow = look()
	assert.Less(t, layerNow.UsedBytes-layer.UsedBytes, int64(1000000))
	assert.Less(t, dirNow.UsedBytes-dir.UsedBytes, int64(1000000))
}

// diskKiB is how much of the host's disk the scratch disk of the node's one VM takes.
func diskKiB(t *testing.T, n *harness.Node) int64 {
	t.Helper()
	var stat unix.Stat_t
	require.NoError(t, unix.Stat(scratchFile(t, n), &stat))
	return stat.Blocks / 2
}

// scratchFile is a path of the scratch disk's file of the node's one VM, which has no name.
func scratchFile(t *testing.T, n *harness.Node) string {
	t.Helper()
	pids, err := n.Pids("qemu-system")
	require.NoError(t, err)
	require.Len(t, pids, 1)
	open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pids[0]))
	require.NoError(t, err)
	for _, fd := range open {
		if name, err := os.Readlink(fd); err == nil && strings.HasPrefix(name, filepath.Join(n.Dir, "scratch")+"/") {
			return fd
		}
	}
	require.FailNow(t, "QEMU has no scratch disk open")
	return ""
}

// sharedMemory is how much of its one guest's memory the node's QEMU holds, KiB.
func sharedMemory(t *testing.T, n *harness.Node) int {
	t.Helper()
	pids, err := n.Pids("qemu-system")
	require.NoError(t, err)
	require.Len(t, pids, 1)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(status), "RssShmem:")
	require.True(t, found)
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	require.NoError(t, err)
	return kib
}

func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}
