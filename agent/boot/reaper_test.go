// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// role tells a copy of the test what it is.
const role = "CLOISTER_TEST_ROLE"

// The copy that is PID 1 needs its main goroutine on the main thread.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "pid1":
		if err := beInit(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	case "child": // ends with a status that must not be lost
		os.Exit(7)
	case "orphan": // leaves a child of its own behind
		if err := start("child").Start(); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Tests run on other threads; the main one must be free for them to fork from.
	runtime.UnlockOSThread()
	os.Exit(m.Run())
}

func start(as string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"="+as)
	return cmd
}

// beInit is PID 1 of a namespace: it reaps on its main thread while other goroutines start processes and wait for them.
func beInit() error {
	if os.Getpid() != 1 {
		return errors.New("not PID 1")
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r := newReaper()
	r.grace = 2 * time.Second
	result := make(chan error, 1)
	go func() {
		defer cancel()
		result <- errors.Join(manyProcesses(), noZombies(ctx), lateWait(ctx))
	}()
	if err := r.Run(ctx); err != nil {
		return err
	}
	return <-result
}

func manyProcesses() error {
	var wg sync.WaitGroup
	errs := make(chan error, 1000)
	for range 8 {
		wg.Go(func() {
			for range 6 {
				var exit *exec.ExitError
				if err := start("child").Run(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
					errs <- fmt.Errorf("exit status lost: %w", err)
				}
				if err := start("orphan").Run(); err != nil {
					errs <- fmt.Errorf("exit status lost: %w", err)
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		return err
	}
	return nil
}

func noZombies(ctx context.Context) error {
	for {
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			return err
		}
		if len(stats) == 1 { // this process
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes are left: %s", strings.Join(stats, " "))
		case <-time.After(time.Millisecond):
		}
	}
}

// lateWait starts a process from a thread that ends, so that it comes to the main thread, and waits for it late.
func lateWait(ctx context.Context) error {
	started := make(chan error)
	cmd := start("child")
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		started <- cmd.Start()
	}()
	if err := <-started; err != nil {
		return err
	}
	// Give the reaper a chance to be wrong: wait until the process has exited, and then until orphans were looked at.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		return fmt.Errorf("child of a thread that ended: %w", err)
	}
	for range 3 {
		if err := start("orphan").Run(); err != nil {
			return err
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		return fmt.Errorf("exit status of a child of a thread that ended is lost: %w", err)
	}
	return noZombies(ctx)
}

func TestReaper(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a pid namespace")
	}
	cmd := start("pid1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
}

func TestReaperRefusesOtherThreads(t *testing.T) {
	done := make(chan error)
	for {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if unix.Gettid() == os.Getpid() {
				done <- nil
				return
			}
			done <- newReaper().Run(t.Context())
		}()
		if err := <-done; err != nil {
			require.ErrorContains(t, err, "main thread")
			return
		}
	}
}
