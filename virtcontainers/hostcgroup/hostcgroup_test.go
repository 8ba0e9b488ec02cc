// SPDX-License-Identifier: Apache-2.0

package hostcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestPath(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", "/cloister/pod1"},
		{"/default/x", "/default/x"},
		{"default/x", "/default/x"},
		{"/a//b/./c/", "/a/b/c"},
		{"system.slice:docker:abc", "/system.slice/docker-abc.scope"},
		{":docker:abc", "/system.slice/docker-abc.scope"},
		{"a.slice::abc", "/a.slice/abc.scope"},
		{"-.slice:x:y", "/x-y.scope"},
		{"kubepods-besteffort-pod1_2.slice:cri-containerd:id",
			"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-id.scope"},
		{"a.slice:p:b.slice", "/a.slice/b.slice"},
	} {
		got, err := Path(tc.in, "pod1")
		require.NoError(t, err, tc.in)
		assert.Equal(t, tc.want, got, tc.in)
	}
	for _, in := range []string{"/", "//", ".", "/a/../..", "../x", "/a/..", "a:b", "a:b:c", "a.slice:b:", "a.slice:b:c:d", "a--b.slice:p:n",
		"x/a.slice:p:n", "a.slice:p:../../x", "a.slice:../..:x", "/a\nb", "/a\x00b", "/" + strings.Repeat("x", 256), strings.Repeat("/x", 2000)} {
		_, err := Path(in, "pod1")
		assert.True(t, errdefs.IsInvalidArgument(err), "%q: %v", in, err)
	}
}

func TestParent(t *testing.T) {
	const slice = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podu.slice"
	for in, want := range map[string]string{
		"":                        "/cloister/pod1",
		"/kubepods/besteffort/pu": "/kubepods/besteffort/pu/pod1",
		slice:                     slice + "/cri-containerd-pod1.scope",
		"kubepods-podu.slice":     "/kubepods.slice/kubepods-podu.slice/cri-containerd-pod1.scope",
	} {
		got, err := Parent(in, "pod1")
		require.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for _, in := range []string{"/a/../..", "../.."} {
		_, err := Parent(in, "pod1")
		assert.True(t, errdefs.IsInvalidArgument(err), "%q: %v", in, err)
	}
}

// real returns the hierarchies of this machine, or skips.
func real(t *testing.T) []hierarchy {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes cgroups: needs root")
	}
	all, err := mounted()
	if err != nil {
		t.Skipf("no cgroups here: %v", err)
	}
	probe := fmt.Sprintf("cloister-probe-%d", os.Getpid())
	for _, h := range all {
		dir := filepath.Join(h.mount, probe)
		if os.Mkdir(dir, 0o755) == nil {
			require.NoError(t, os.Remove(dir))
			return all
		}
	}
	t.Skip("no cgroup hierarchy can be written")
	return nil
}

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return cmd
}

// testPath is below a parent of its own, so that parents are seen to go.
func testPath(t *testing.T) string {
	return fmt.Sprintf("/cloister-test-%d/mid/%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "_"))
}

func assertGone(t *testing.T, all []hierarchy, path string) {
	t.Helper()
	top := "/" + strings.Split(path, "/")[1]
	for _, h := range all {
		assert.NoDirExists(t, filepath.Join(h.mount, top))
	}
}

// subsets are the ways a host can be: all there is, version 1 alone, version 2 alone.
func subsets(all []hierarchy) map[string][]hierarchy {
	m := map[string][]hierarchy{"as mounted": all}
	for _, h := range all {
		if h.v2 {
			m["v2"] = append(m["v2"], h)
		} else {
			m["v1"] = append(m["v1"], h)
		}
	}
	return m
}

func TestLife(t *testing.T) {
	all := real(t)
	for name, hs := range subsets(all) {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			path := testPath(t)
			g, err := create(ctx, hs, path)
			require.NoError(t, err)
			t.Cleanup(func() { g.Delete(ctx) })
			assert.Equal(t, path, g.Path())
			require.NotEmpty(t, g.hierarchies)

			_, err = create(ctx, hs, path)
			assert.True(t, errdefs.IsAlreadyExists(err), "%v", err)

			cmd := sleeper(t)
			require.NoError(t, g.AddProcess(ctx, cmd.Process.Pid))
			for _, h := range g.hierarchies {
				assert.Equal(t, []string{fmt.Sprint(cmd.Process.Pid)}, processes(filepath.Join(h.mount, path)), h.String())
			}
			s, err := g.Stats()
			require.NoError(t, err)
			if name != "v2" {
				assert.NotZero(t, s.Pids)
			}

			// Delete waits, and kills nothing.
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			err = g.Delete(short)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			assert.Contains(t, err.Error(), fmt.Sprint(cmd.Process.Pid))
			require.NoError(t, unix.Kill(cmd.Process.Pid, 0))

			var wg sync.WaitGroup
			wg.Go(func() {
				cmd.Process.Kill()
				cmd.Wait()
			})
			long, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			require.NoError(t, g.Delete(long))
			wg.Wait()
			require.NoError(t, g.Delete(ctx), "repeated")
			assertGone(t, all, path)
			_, err = g.Stats()
			assert.True(t, errdefs.IsNotFound(err), "%v", err)
			assert.Error(t, g.AddProcess(ctx, os.Getpid()), "a deleted cgroup cannot be joined")
		})
	}
}

func TestStatsCount(t *testing.T) {
	all := real(t)
	ctx := context.Background()
	g, err := Create(ctx, testPath(t))
	require.NoError(t, err)
	// Reads its line only after it joined, then burns some CPU time.
	cmd := exec.Command("sh", "-c", "read x; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo done; read x")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	require.NoError(t, g.AddProcess(ctx, cmd.Process.Pid))
	fmt.Fprintln(in)
	_, err = out.Read(make([]byte, 8))
	require.NoError(t, err)
	s, err := g.Stats()
	require.NoError(t, err)
	assert.Positive(t, s.CPU)
	assert.Positive(t, s.Memory)
	assert.LessOrEqual(t, s.Memory, s.MemoryPeak)
	assert.Equal(t, uint64(1), s.Pids)
	in.Close()
	cmd.Wait()
	require.NoError(t, g.Delete(ctx))
	assertGone(t, all, g.Path())
}

func TestDeleteByPath(t *testing.T) {
	all := real(t)
	ctx := context.Background()
	path := testPath(t)
	g, err := Create(ctx, path)
	require.NoError(t, err)
	// A child of somebody's making goes along, since it is empty.
	require.NoError(t, os.Mkdir(filepath.Join(g.hierarchyDir(g.hierarchies[0]), "child"), 0o755))
	// A killed shim may have got half-way.
	require.NoError(t, unix.Rmdir(g.hierarchyDir(g.hierarchies[len(g.hierarchies)-1])))
	require.NoError(t, DeleteByPath(ctx, path))
	require.NoError(t, DeleteByPath(ctx, path))
	for _, h := range all {
		os.Remove(filepath.Join(h.mount, filepath.Dir(path)))
		os.Remove(filepath.Join(h.mount, filepath.Dir(filepath.Dir(path))))
	}
	assertGone(t, all, path)
	assert.True(t, errdefs.IsInvalidArgument(DeleteByPath(ctx, "/")))
	_, err = Load(path)
	assert.True(t, errdefs.IsNotFound(err), "%v", err)
}

// Parents that were there before, or that have other children, stay.
func TestParentsStay(t *testing.T) {
	all := real(t)
	ctx := context.Background()
	h := all[0]
	top := fmt.Sprintf("/cloister-test-%d", os.Getpid())
	require.NoError(t, os.Mkdir(filepath.Join(h.mount, top), 0o755))
	defer os.Remove(filepath.Join(h.mount, top))
	a, err := create(ctx, all[:1], top+"/made/a")
	require.NoError(t, err)
	b, err := create(ctx, all[:1], top+"/made/b")
	require.NoError(t, err)
	require.NoError(t, a.Delete(ctx))
	assert.DirExists(t, filepath.Join(h.mount, top, "made"))
	require.NoError(t, b.Delete(ctx))
	assert.NoDirExists(t, filepath.Join(h.mount, top, "made"))
	assert.DirExists(t, filepath.Join(h.mount, top))
}

// Pods below one parent come and go at once.
func TestConcurrent(t *testing.T) {
	all := real(t)
	ctx := context.Background()
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for k := range 8 {
		wg.Go(func() {
			for i := range 20 {
				g, err := Create(ctx, fmt.Sprintf("/cloister-test-%d/p/%d-%d", os.Getpid(), k, i))
				if err == nil {
					err = g.Delete(ctx)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	assertGone(t, all, fmt.Sprintf("/cloister-test-%d", os.Getpid()))
}

func TestAddProcessFaults(t *testing.T) {
	real(t)
	ctx := context.Background()
	g, err := Create(ctx, testPath(t))
	require.NoError(t, err)
	defer g.Delete(ctx)
	for _, pid := range []int{0, -1} {
		assert.True(t, errdefs.IsInvalidArgument(g.AddProcess(ctx, pid)))
	}
	cmd := exec.Command("true")
	require.NoError(t, cmd.Run())
	err = g.AddProcess(ctx, cmd.Process.Pid)
	assert.True(t, errdefs.IsNotFound(err), "%v", err)
}

// A hierarchy that does not let us in is left out; none at all is an error.
func TestForbiddenHierarchies(t *testing.T) {
	all := real(t)
	ctx := context.Background()
	sealed := hierarchy{mount: "/sys/kernel", controllers: []string{"sealed"}} // mkdir gives EPERM there, to root too
	if err := os.Mkdir("/sys/kernel/cloister", 0o755); !forbidden(err) {
		t.Skipf("sysfs answers %v", err)
	}
	g, err := create(ctx, append([]hierarchy{sealed}, all...), testPath(t))
	require.NoError(t, err)
	assert.NotContains(t, g.hierarchies, sealed)
	require.NoError(t, g.Delete(ctx))
	_, err = create(ctx, []hierarchy{sealed}, testPath(t))
	require.Error(t, err)
	assert.True(t, errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES), "%v", err)
	assertGone(t, all, testPath(t))
}

// A version 2 host cannot be had beside version 1, but its files can.
func TestStatsOfVersion2(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string]string{
		"cpu.stat":       "usage_usec 3000000\nuser_usec 2000000\nsystem_usec 1000000\n",
		"memory.current": "1048576\n",
		"memory.peak":    "2097152\n",
		"memory.stat":    "anon 5\ninactive_file 4096\n",
		"pids.current":   "7\n",
	} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "g"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "g", name), []byte(data), 0o644))
	}
	g, err := load([]hierarchy{{mount: dir, v2: true}}, "/g")
	require.NoError(t, err)
	s, err := g.Stats()
	require.NoError(t, err)
	assert.Equal(t, Stats{CPU: 3 * time.Second, CPUUser: 2 * time.Second, CPUSystem: time.Second,
		Memory: 1 << 20, MemoryPeak: 2 << 20, MemoryInactiveFile: 4096, Pids: 7}, s)
}

func TestDelegate(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpuset memory hugetlb\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), nil, 0o644))
	h := hierarchy{mount: dir, v2: true}
	require.NoError(t, h.make(context.Background(), "/a/b"))
	got, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	require.NoError(t, err)
	assert.Equal(t, "+memory", string(got))
	assert.DirExists(t, filepath.Join(dir, "a/b"))
}
