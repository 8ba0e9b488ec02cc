// SPDX-License-Identifier: Apache-2.0

package supervise

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

// FirstInheritedFD is the number of the first of Command.Files, after stdin, stdout and stderr.
const FirstInheritedFD = 3

// Command is a VMM to start.
type Command struct {
	// Name of the VMM for people, "QEMU" for example.
	Name string
	Path string
	Args []string
	// Files are inherited, from FirstInheritedFD on. The caller closes its own copies.
	Files []*os.File
	// Stdout and Stderr get what the VMM writes there. They are the caller's, too.
	Stdout, Stderr *os.File
	// NetNS is entered where not nil.
	NetNS *os.File
	// Prepare, where not nil, is called on the VMM's own thread before it starts: what it changes of the thread (namespaces)
	// is the VMM's. An error ends the start.
	Prepare func() error
}

// Process is a running VMM.
type Process struct {
	name string
	proc *os.Process
	// done is closed when the process is gone and reaped; state is valid then.
	done  chan struct{}
	state *os.ProcessState
}

// PID of the VMM.
func (p *Process) PID() int { return p.proc.Pid }

// Done is closed when the VMM is gone and reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Status is how the VMM ended; valid after Done.
func (p *Process) Status() syscall.WaitStatus { return p.state.Sys().(syscall.WaitStatus) }

// Kill ends the VMM at once; no error if it is gone already.
func (p *Process) Kill() error {
	if err := p.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	return nil
}

// Start starts a VMM on a thread that lives as long as the VMM does.
func Start(c Command) (*Process, error) {
	// Files that this process inherited itself may lack O_CLOEXEC; those of the Go runtime never do. The numbers in a
	// child are set anew by os/exec, so this takes nothing away from other children.
	if err := unix.CloseRange(FirstInheritedFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return nil, fmt.Errorf("keep files from %s: %w", c.Name, err)
	}
	type started struct {
		p   *Process
		err error
	}
	result := make(chan started, 1)
	OnOwnThread(func() {
		cmd, err := c.start()
		if err != nil {
			result <- started{err: err}
			return
		}
		p := &Process{name: c.Name, proc: cmd.Process, done: make(chan struct{})}
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
func (c Command) start() (*exec.Cmd, error) {
	if c.NetNS != nil {
		if err := unix.Setns(int(c.NetNS.Fd()), unix.CLONE_NEWNET); err != nil {
			return nil, fmt.Errorf("enter the network namespace %s for %s: %w", c.NetNS.Name(), c.Name, err)
		}
	}
	if c.Prepare != nil {
		if err := c.Prepare(); err != nil {
			return nil, fmt.Errorf("start %s: %w", c.Name, err)
		}
	}
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
	cmd.ExtraFiles = c.Files
	// Nothing of the shim's environment concerns a VMM, and none of its directories is to be kept busy.
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, // the terminal's and the caller's signals are not for the VMM
		// For a VMM that can ask for the same itself, it covers the time until it has.
		Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return cmd, nil
}

// OnOwnThread runs f in a goroutine that is locked to a thread; the thread, and what f changed of it, ends with f. It is
// never the process's main thread: that one cannot end, and would keep the namespace that f entered.
func OnOwnThread(f func()) {
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

// CloseFiles closes the files that are not nil; closing twice does no harm.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
