// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// firstInheritedFD is the number of the first inherited file, after stdin, stdout and stderr.
const firstInheritedFD = 3

// processSpec is a QEMU to start.
type processSpec struct {
	path string
	args []string
	// files are inherited, from firstInheritedFD on. The caller closes its own copies.
	files []*os.File
	// output gets stdout and stderr.
	output *os.File
	// netns is entered where not nil.
	netns *os.File
}

// process is a running QEMU.
type process struct {
	proc *os.Process
	// done is closed when the process is gone and reaped; state is valid then.
	done  chan struct{}
	state *os.ProcessState
}

func (p *process) pid() int { return p.proc.Pid }

// kill ends the process at once; no error if it is gone already.
func (p *process) kill() error {
	if err := p.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	return nil
}

// startProcess starts QEMU on a thread that lives as long as QEMU does.
func startProcess(spec processSpec) (*process, error) {
	// Files that this process inherited itself may lack O_CLOEXEC; those of the Go runtime never do. The numbers in a
	// child are set anew by os/exec, so this takes nothing away from other children.
	if err := unix.CloseRange(firstInheritedFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return nil, fmt.Errorf("keep files from QEMU: %w", err)
	}
	type started struct {
		p   *process
		err error
	}
	result := make(chan started, 1)
	onOwnThread(func() {
		cmd, err := spec.start()
		if err != nil {
			result <- started{err: err}
			return
		}
		p := &process{proc: cmd.Process, done: make(chan struct{})}
		result <- started{p: p}
		// The error only repeats what the state says; no I/O is left to be copied, all files are real ones.
		_ = cmd.Wait()
		p.state = cmd.ProcessState
		close(p.done)
	})
	r := <-result
	return r.p, r.err
}

// start runs on the locked thread.
func (s processSpec) start() (*exec.Cmd, error) {
	if s.netns != nil {
		if err := unix.Setns(int(s.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return nil, fmt.Errorf("enter the network namespace %s for QEMU: %w", s.netns.Name(), err)
		}
	}
	cmd := exec.Command(s.path, s.args...)
	cmd.Stdout, cmd.Stderr = s.output, s.output
	cmd.ExtraFiles = s.files
	// Nothing of the shim's environment concerns QEMU, and none of its directories is to be kept busy.
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, // the terminal's and the caller's signals are not for QEMU
		// Also covers the time until QEMU has set its own (-run-with exit-with-parent).
		Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	return cmd, nil
}

// onOwnThread runs f in a goroutine that is locked to a thread; the thread ends with f. It is never the process's main
// thread: that one cannot end, and would keep the namespace that f entered.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // without unlocking: the runtime ends the thread
			return
		}
		// While this goroutine holds the main thread, the next one gets another.
		placed := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(placed)
			f()
		}()
		<-placed
		runtime.UnlockOSThread()
	}()
}
