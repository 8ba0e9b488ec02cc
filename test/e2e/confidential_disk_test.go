// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// diskMarker is what pods write to find it on the host's side, or not.
const diskMarker = "what a pod wrote to its disk, line "

// diskBlock is the block of the scratch disk's encryption and file system.
const diskBlock = 4096

// integrityFailure is what the guest's kernel says of a block that is not what it wrote (drivers/md/dm-integrity.c).
const integrityFailure = "Checksum failed"

// checkEncryptedDisk: what a confidential pod writes to the host's disk the host cannot read, change, or put back.
func checkEncryptedDisk(t *testing.T, n *harness.Node, pod *harness.Pod, arch string) {
	k := newKubeletPod(t, pod)
	empty := k.directory("volumes/kubernetes.io~empty-dir/disk")
	require.NoError(t, os.Chmod(empty, 0o777))
	c := runContainer(t, pod, harness.ContainerSpec{
		Image: toolImage(t, n, arch, "volumeprobe"), Script: idle,
		Mounts: []*runtimeapi.Mount{{HostPath: empty, ContainerPath: "/disk"}},
	})
	console := func() string {
		text, err := os.ReadFile(filepath.Join(stateDirectory(n, "k8s.io", pod.ID), "console.log"))
		require.NoError(t, err)
		return string(text)
	}
	cold := func() string { return output(t, c, "volumeprobe cold /disk/victim || true") }
	const (
		whole  = `^[0-9a-f]{64}$`
		failed = "read /disk/victim: input/output error"
		fill   = "dd if=/dev/urandom of=/disk/victim bs=1M count=8 conv=notrunc 2> /dev/null; sync"
	)

	t.Run("unreadable", func(t *testing.T) {
		assert.Equal(t, "ext2/ext3", output(t, c, "stat -f -c %T /disk"), "as busybox calls ext4")
		before := diskKiB(t, n)
		output(t, c, "for i in $(seq 1000); do echo '"+diskMarker+"'$i; done > /disk/marker; cp /disk/marker /root/marker; "+
			"head -c 4000000 /dev/urandom > /disk/more; sync")
		assert.Greater(t, diskKiB(t, n)-before, int64(3000), "it is on the disk")
		assert.False(t, hostSees(t, n, diskMarker+"7"))
		assert.False(t, hostSees(t, n, "lost+found"), "names of files are encrypted, too")
		assert.Empty(t, entries(t, filepath.Join(n.Dir, "scratch")), "the file has no name, so that it goes with the VM")
	})
	t.Run("usage", func(t *testing.T) { checkUsage(t, pod, c, "disk", "/disk") })
	t.Run("reads what was written only", func(t *testing.T) {
		// Many inodes, blocks that are written in part, holes, attributes, what is deleted and written again: a block that was
		// never written has no tag, and reading it would fail.
		output(t, c, "for d in a b c; do mkdir -p /disk/$d/x /root/$d; for i in $(seq 150); do echo $i > /disk/$d/$i; ln -s $i /disk/$d/x/$i; "+
			"echo $i > /root/$d/$i; done; rm -r /disk/a; done; dd if=/dev/zero of=/disk/hole bs=1 count=3 seek=70001 2> /dev/null; "+
			"echo more >> /disk/hole; sync; cat /disk/hole /disk/c/* > /dev/null 2>&1; find /disk /root > /dev/null; rm -r /disk/b /disk/c")
		assert.NotContains(t, console(), integrityFailure)
	})

	output(t, c, fill)
	old, first := cold(), readDisk(t, n)
	require.Regexp(t, whole, old)
	output(t, c, fill)
	now, second := cold(), readDisk(t, n)
	require.Regexp(t, whole, now)
	require.NotEqual(t, old, now)
	places := changedRuns(first, second)
	require.Greater(t, len(places), 1000, "the file's blocks, written over where they are")
	put := func(blocks map[int64][]byte) { writeDisk(t, n, places, blocks) }

	t.Run("an old state is not taken", func(t *testing.T) {
		put(first)
		assert.Equal(t, failed, cold())
		assert.Contains(t, console(), integrityFailure)
		put(second)
		assert.Equal(t, now, cold(), "the pod's own state is")
	})
	t.Run("a flipped bit is not taken", func(t *testing.T) {
		flipped := map[int64][]byte{}
		for _, at := range places {
			flipped[at] = slices.Clone(second[at])
			flipped[at][diskBlock/2] ^= 1
		}
		put(flipped)
		assert.Equal(t, failed, cold())
		assert.Equal(t, "1000", output(t, c, "wc -l < /disk/marker"), "the pod goes on")
		put(second)
		assert.Equal(t, now, cold())
		assert.Equal(t, "new", output(t, c, "echo new > /disk/new; sync; cat /disk/new"))
	})
	t.Run("a pod outlives its disk", func(t *testing.T) {
		all, garbage := readDisk(t, n), map[int64][]byte{}
		for at := range all {
			garbage[at] = bytes.Repeat([]byte{0xa5}, diskBlock)
		}
		writeDisk(t, n, slices.Collect(maps.Keys(garbage)), garbage)
		assert.Equal(t, failed, cold())
		assert.Equal(t, "lives", output(t, c, "echo lives"))
	})
}

// readDisk reads the blocks of the scratch disk that the host's file has.
func readDisk(t *testing.T, n *harness.Node) map[int64][]byte {
	t.Helper()
	f, err := os.Open(scratchFile(t, n))
	require.NoError(t, err)
	defer f.Close()
	blocks := map[int64][]byte{}
	for end := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return blocks
		}
		require.NoError(t, err)
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		require.NoError(t, err)
		for at := start / diskBlock * diskBlock; at < end; at += diskBlock {
			b := make([]byte, diskBlock)
			_, err := f.ReadAt(b, at)
			require.True(t, err == nil || errors.Is(err, io.EOF), err)
			blocks[at] = b
		}
	}
}

// hostSees reports whether a text is in a block of the host's file.
func hostSees(t *testing.T, n *harness.Node, text string) bool {
	t.Helper()
	blocks := readDisk(t, n)
	require.NotEmpty(t, blocks)
	for _, b := range blocks {
		if bytes.Contains(b, []byte(text)) {
			return true
		}
	}
	return false
}

// changedRuns are the places of blocks that changed between two states, in runs too long for anything but a file's content: the
// file system's own blocks are left as they are, so that it goes on.
func changedRuns(before, after map[int64][]byte) (places []int64) {
	const shortest = 64
	var run []int64
	keep := func() {
		if len(run) >= shortest {
			places = append(places, run...)
		}
		run = nil
	}
	var all []int64
	for at, b := range after {
		if old, there := before[at]; there && !bytes.Equal(old, b) {
			all = append(all, at)
		}
	}
	slices.Sort(all)
	for _, at := range all {
		if len(run) > 0 && run[len(run)-1]+diskBlock != at {
			keep()
		}
		run = append(run, at)
	}
	keep()
	return places
}

// writeDisk is the hostile host.
func writeDisk(t *testing.T, n *harness.Node, places []int64, blocks map[int64][]byte) {
	t.Helper()
	f, err := os.OpenFile(scratchFile(t, n), os.O_WRONLY, 0)
	require.NoError(t, err)
	defer f.Close()
	for _, at := range places {
		_, err := f.WriteAt(blocks[at], at)
		require.NoError(t, err)
	}
}
