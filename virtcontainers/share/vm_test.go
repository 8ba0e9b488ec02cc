// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/idmap"
)

// vm is a guest that mounts the share.
type vm struct {
	cmd     *exec.Cmd
	in      io.Writer
	lines   chan string
	console *tail
}

const vmTimeout = 90 * time.Second

// startVM boots CLOISTER_TEST_KERNEL, which has virtio-fs, virtio-pci and a serial console built in, under emulation.
func startVM(t *testing.T, socket string) *vm {
	t.Helper()
	kernel := os.Getenv("CLOISTER_TEST_KERNEL")
	if kernel == "" {
		t.Skip("set CLOISTER_TEST_KERNEL to a kernel image with virtio-fs")
	}
	qemu := os.Getenv("CLOISTER_TEST_QEMU")
	if qemu == "" {
		qemu = "qemu-system-x86_64"
	}
	if _, err := exec.LookPath(qemu); err != nil {
		t.Skip(err)
	}
	v := &vm{lines: make(chan string, 100), console: &tail{max: 16 << 10}}
	v.cmd = exec.Command(qemu, "-accel", "tcg", "-machine", "q35,memory-backend=ram", "-cpu", "max", "-smp", "1", "-m", "256M",
		"-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd(t), "-append", "console=ttyS0 quiet panic=-1 rdinit=/init",
		"-chardev", "socket,id=fs,path="+socket, "-device", "vhost-user-fs-pci,chardev=fs,tag=shares")
	var err error
	v.in, err = v.cmd.StdinPipe()
	must(t, err)
	out, err := v.cmd.StdoutPipe()
	must(t, err)
	v.cmd.Stderr = v.console
	must(t, v.cmd.Start())
	t.Cleanup(func() {
		_ = v.cmd.Process.Kill()
		for range v.lines { // until the console is closed
		}
		_ = v.cmd.Wait()
	})
	go func() {
		defer close(v.lines)
		scanner := bufio.NewScanner(io.TeeReader(out, v.console))
		for scanner.Scan() {
			if _, line, ok := strings.Cut(scanner.Text(), "@@"); ok {
				v.lines <- line
			}
		}
	}()
	_, err = v.answer(t)
	require.NoError(t, err, "mount in the guest")
	return v
}

func (v *vm) answer(t *testing.T) (string, error) {
	t.Helper()
	select {
	case line, ok := <-v.lines:
		if !ok {
			t.Fatalf("the VM ended: %s", v.console)
		}
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if kind != "ok" {
			return "", fmt.Errorf("guest: %s", rest)
		}
		b, err := hex.DecodeString(rest)
		must(t, err)
		return string(b), nil
	case <-time.After(vmTimeout):
		t.Fatalf("no answer from the VM: %s", v.console)
	}
	return "", nil
}

func (v *vm) try(t *testing.T, words ...string) (string, error) {
	t.Helper()
	_, err := fmt.Fprintln(v.in, strings.Join(words, "\t"))
	must(t, err)
	return v.answer(t)
}

func (v *vm) do(t *testing.T, words ...string) string {
	t.Helper()
	out, err := v.try(t, words...)
	require.NoError(t, err, "%v", words)
	return out
}

// initrd builds testdata/guestinit and puts it into an archive for the kernel.
func initrd(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", binary, "-ldflags=-s -w", "./testdata/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	program, err := os.ReadFile(binary)
	must(t, err)
	var b bytes.Buffer
	entry := func(name string, mode, rdevMajor, rdevMinor int, contents []byte) { // newc, Documentation/driver-api/early-userspace
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", b.Len(), mode, 0, 0, 1, 0, len(contents), 0, 0,
			rdevMajor, rdevMinor, len(name)+1, 0)
		for _, part := range [][]byte{append([]byte(name), 0), contents} {
			b.Write(part)
			for b.Len()%4 != 0 {
				b.WriteByte(0)
			}
		}
	}
	entry("dev", unix.S_IFDIR|0o755, 0, 0, nil)
	entry("dev/console", unix.S_IFCHR|0o600, 5, 1, nil)
	entry("init", unix.S_IFREG|0o755, 0, 0, program)
	entry("TRAILER!!!", 0, 0, 0, nil)
	path := filepath.Join(dir, "initrd")
	must(t, os.WriteFile(path, b.Bytes(), 0o600))
	return path
}

func TestInGuest(t *testing.T) {
	forEachDaemon(t, func(t *testing.T, virtiofsd string) {
		ctx := context.Background()
		s, err := Start(ctx, Config{Virtiofsd: virtiofsd, StateDir: stateDir(t)})
		must(t, err)
		defer func() { must(t, s.Close(ctx)) }()
		host := t.TempDir()
		onHost := func(name string) string { return filepath.Join(host, name) }
		put := func(name, contents string) { must(t, os.WriteFile(onHost(name), []byte(contents), 0o644)) }
		get := func(name string) string {
			b, err := os.ReadFile(onHost(name))
			must(t, err)
			return string(b)
		}
		put("before", "from the host")
		whole, err := s.Add(ctx, host, Writable, idmap.Map{})
		must(t, err)
		first := whole.Name
		v := startVM(t, s.Socket())

		require.Equal(t, "from the host", v.do(t, "read", first+"/before"))
		v.do(t, "write", first+"/guest", "from the guest")
		require.Equal(t, "from the guest", get("guest"))
		v.do(t, "chown", first+"/guest")
		var st unix.Stat_t
		must(t, unix.Stat(onHost("guest"), &st))
		require.Equal(t, []uint32{1234, 5678}, []uint32{st.Uid, st.Gid})
		v.do(t, "setxattr", first+"/guest", "hello")
		value := make([]byte, 10)
		n, err := unix.Getxattr(onHost("guest"), "user.note", value)
		must(t, err)
		require.Equal(t, "hello", string(value[:n]))

		t.Run("changes on the host show at once", func(t *testing.T) {
			for i := range 5 {
				contents := strings.Repeat("x", i) + fmt.Sprint("version ", i)
				put("before", contents)
				require.Equal(t, contents, v.do(t, "read", first+"/before"))
				require.Contains(t, v.do(t, "stat", first+"/before"), fmt.Sprintf("size=%d ", len(contents)))
			}
			v.do(t, "hold", first+"/before")
			put("before", "while it is open")
			require.Equal(t, "while it is open", v.do(t, "reread", first+"/before"))
			put("before", "WHILE IT IS OPEN") // of the same size
			require.Equal(t, "WHILE IT IS OPEN", v.do(t, "reread", first+"/before"))
			v.do(t, "release", first+"/before")
			// As kubelet updates a ConfigMap: by a rename.
			put("new", "renamed over it")
			must(t, os.Rename(onHost("new"), onHost("before")))
			require.Equal(t, "renamed over it", v.do(t, "read", first+"/before"))
			must(t, os.Remove(onHost("before")))
			_, err := v.try(t, "stat", first+"/before")
			require.ErrorContains(t, err, "no such file")
			put("before", "back again")
			require.Equal(t, "back again", v.do(t, "read", first+"/before"))
			require.Equal(t, "before guest", v.do(t, "ls", first))
		})
		t.Run("memory maps", func(t *testing.T) {
			put("map", strings.Repeat(".", 4096))
			v.do(t, "map", first+"/map", "mapped")
			require.True(t, strings.HasPrefix(get("map"), "mapped...."))
		})
		t.Run("added while it runs", func(t *testing.T) {
			second := t.TempDir()
			must(t, os.WriteFile(filepath.Join(second, "f"), []byte("second"), 0o644))
			place, err := s.Add(ctx, second, ReadOnly, idmap.Map{})
			must(t, err)
			name := place.Name
			require.Equal(t, "second", v.do(t, "read", name+"/f"))
			_, err = v.try(t, "write", name+"/f", "x")
			require.ErrorContains(t, err, "read-only")
			_, err = v.try(t, "rm", name+"/f")
			require.ErrorContains(t, err, "read-only")
			again, err := s.Add(ctx, second, Writable, idmap.Map{})
			must(t, err)
			require.Equal(t, name, again.Name)
			v.do(t, "write", name+"/f", "writable now")
			file, err := s.Add(ctx, filepath.Join(second, "f"), Writable, idmap.Map{})
			must(t, err)
			require.Equal(t, [2]string{name, "f"}, [2]string{file.Name, file.Path})
			require.ElementsMatch(t, []string{first, name}, strings.Fields(v.do(t, "ls", "")))
			must(t, s.Remove(ctx, place))
			must(t, s.Remove(ctx, again))
			require.Equal(t, "writable now", v.do(t, "read", name+"/f"))
			must(t, s.Remove(ctx, file))
			_, err = v.try(t, "read", name+"/f")
			require.Error(t, err)
			require.Equal(t, first, v.do(t, "ls", ""))
		})
		t.Run("mounted on the host while it runs", func(t *testing.T) {
			third := t.TempDir()
			must(t, unix.Mount(third, third, "", unix.MS_BIND, ""))
			defer func() { must(t, unix.Unmount(third, unix.MNT_DETACH)) }()
			must(t, unix.Mount("", third, "", unix.MS_SHARED, ""))
			must(t, os.Mkdir(filepath.Join(third, "sub"), 0o755))
			place, err := s.Add(ctx, third, Writable, idmap.Map{})
			must(t, err)
			name := place.Name
			require.Empty(t, v.do(t, "ls", name+"/sub"))
			must(t, unix.Mount("tmpfs", filepath.Join(third, "sub"), "tmpfs", 0, ""))
			must(t, os.WriteFile(filepath.Join(third, "sub/f"), []byte("below"), 0o644))
			require.Empty(t, v.do(t, "ls", name+"/sub"), "it does not show")
			must(t, unix.Unmount(filepath.Join(third, "sub"), 0)) // and is not kept busy
			must(t, s.Remove(ctx, place))
		})
		t.Run("nothing else is there", func(t *testing.T) {
			for _, words := range [][]string{{"write", "intruder", "x"}, {"rm", first}, {"rename", first, "other"}} {
				_, err := v.try(t, words...)
				require.Error(t, err, "%v", words)
			}
			// What the sandboxed process itself could reach.
			mounts := worker(t, s.PID(), "mountinfo")
			require.Contains(t, mounts, host[strings.LastIndex(host, "/"):])
			for _, line := range strings.Split(strings.TrimSpace(mounts), "\n") {
				place := strings.Fields(line)[4]
				require.True(t, place == "/" || strings.HasPrefix(place, "/"+first), "mounted in virtiofsd's namespace: %s", line)
			}
			require.Contains(t, worker(t, s.PID(), "status"), "Seccomp:\t2")
		})
		_, err = fmt.Fprintln(v.in, "off")
		must(t, err)
		<-s.Done() // it ends with the VM
	})
}

// worker reads a file of /proc of the process that serves the guest: a descendant of virtiofsd as it was started. While that
// starts, it has others that end.
func worker(t *testing.T, virtiofsd int, file string) string {
	t.Helper()
	for {
		pid, err := lastDescendant(virtiofsd)
		if err == nil {
			var b []byte
			if b, err = os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file)); err == nil {
				return string(b)
			}
		}
		if !errors.Is(err, unix.ESRCH) && !errors.Is(err, os.ErrNotExist) || unix.Kill(virtiofsd, 0) != nil {
			require.NoError(t, err)
		}
	}
}

func lastDescendant(pid int) (int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, err
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			return 0, err
		}
		if fields := strings.Fields(string(b)); len(fields) > 0 {
			next, err := strconv.Atoi(fields[0])
			if err != nil {
				return 0, err
			}
			return lastDescendant(next)
		}
	}
	return pid, nil
}

// A killed shim takes virtiofsd along, with a VM connected or not.
func TestDiesWithItsParent(t *testing.T) {
	forEachDaemon(t, func(t *testing.T, virtiofsd string) {
		for _, connected := range []bool{false, true} {
			t.Run(fmt.Sprintf("connected=%v", connected), func(t *testing.T) {
				dir := stateDir(t)
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), childEnv+"="+dir, "CLOISTER_TEST_SHARE_DAEMON="+virtiofsd)
				cmd.Stderr = os.Stderr
				out, err := cmd.StdoutPipe()
				must(t, err)
				must(t, cmd.Start())
				defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
				line, err := bufio.NewReader(out).ReadString('\n')
				must(t, err)
				pid, err := strconv.Atoi(strings.TrimSpace(line))
				require.NoError(t, err, line)
				if connected {
					startVM(t, filepath.Join(dir, socketName))
				}
				pidfd, err := unix.PidfdOpen(pid, 0)
				must(t, err)
				defer unix.Close(pidfd)
				last, err := strconv.Atoi(strings.Fields(worker(t, pid, "stat"))[0])
				must(t, err)
				lastfd, err := unix.PidfdOpen(last, 0)
				must(t, err)
				defer unix.Close(lastfd)
				must(t, cmd.Process.Kill())
				waitGone(t, pidfd)
				waitGone(t, lastfd)
			})
		}
	})
}
