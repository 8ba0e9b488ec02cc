// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent/launch"
	"github.com/cloister-project/cloister/tee/abi"
)

// System is the guest as its PID 1 sees it.
type System struct {
	reaper   *Reaper
	powerOff sync.Once

	launch    launch.Launch
	launchErr error

	// modules is closed when the background loading has ended; modulesErr is valid from then on.
	modules    chan struct{}
	modulesErr error

	mu    sync.Mutex
	marks []*agentv1.BootMark
}

// Init brings the guest up. It must be called once, by PID 1, in the initramfs. When it returns without an error vsock
// works; see WaitModules for what may still be on its way. In a confidential guest nothing is: the launch can be checked
// against hardware and disks before the host hears of the guest (Launch, and WaitModules for what could not be loaded).
// After an error the guest is of no use: the caller prints it and exits, which makes the kernel panic.
func Init(ctx context.Context) (*System, error) {
	if pid := os.Getpid(); pid != 1 {
		return nil, fmt.Errorf("the agent runs as PID 1 of a guest only, this is process %d", pid)
	}
	s := &System{reaper: newReaper(), modules: make(chan struct{})}
	s.mark("init")

	initramfs, err := os.OpenRoot("/")
	if err != nil {
		return nil, fmt.Errorf("open the initramfs: %w", err)
	}
	list, err := readLoadList(initramfs)
	if err != nil {
		return nil, err
	}
	if err := enterRoot(); err != nil {
		return nil, err
	}
	s.mark("mounts")
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	s.launch, s.launchErr = launch.Parse(string(cmdline))
	if err := loadModules(initramfs, list, phaseEarly, s.mark); err != nil {
		return nil, err
	}
	s.mark("vsock")
	if err := setupCgroups(cgroupRoot); err != nil {
		return nil, err
	}
	s.mark("cgroups")
	if err := setupKernel(ctx); err != nil {
		return nil, err
	}
	if s.launch.Confidential() {
		if err := refuseMemory(newMemory); err != nil {
			return nil, err
		}
	}
	ready, err := crngReady()
	if err != nil {
		return nil, err
	}
	if !ready {
		// Not an error: with random.trust_cpu=on the kernel credits RDRAND at its start; without it reads of random
		// bytes, the first stream id for example, wait for the kernel to gather enough.
		s.mark("no-entropy-yet")
		log.G(ctx).Warn("the kernel's random number generator is not seeded yet")
	}
	s.mark("up")
	if !s.launch.Confidential() {
		go s.loadLater(ctx, initramfs, list)
		return s, nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.loadLater(ctx, initramfs, list)
	}()
	<-done
	return s, nil
}

// Launch is what the kernel's command line says of the launch. An error means that the guest must not go on.
func (s *System) Launch() (launch.Launch, error) { return s.launch, s.launchErr }

// loaderNice is the niceness of loading in the background.
const loaderNice = 10

// loadLater loads the modules that vsock does not need, then frees the initramfs and locks module loading.
func (s *System) loadLater(ctx context.Context, initramfs *os.Root, list []listed) {
	// The kernel loads modules in long stretches; on a single CPU the talk with the host goes first. The thread ends
	// with the goroutine: no other one must inherit its priority.
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), loaderNice); err != nil {
		log.G(ctx).WithError(err).Warn("lower the priority of module loading")
	}
	err := loadModules(initramfs, list, phaseLater, s.mark)
	if err == nil && s.launch.Confidential() {
		if err = s.loadConfidential(initramfs, list); err == nil {
			err = s.loadPlatform(initramfs, list)
		}
	} else if err == nil {
		err = loadModules(initramfs, list, string(abi.None), s.mark)
	}
	if err == nil {
		err = lockModules(len(list) > 0)
	}
	// What is deleted here is memory that containers can have.
	err = errors.Join(err, initramfs.RemoveAll("lib"), initramfs.RemoveAll("dev"), initramfs.Close())
	if err != nil {
		s.modulesErr = fmt.Errorf("load kernel modules: %w", err)
		log.G(ctx).WithError(err).Error("kernel modules are missing")
	}
	s.mark("modules")
	close(s.modules)
	// Last and outside the gate: whoever waits for a disk is told of it by the kernel as soon as it is found.
	if err := scanSCSI(); err != nil {
		log.G(ctx).WithError(err).Error("disks may be missing")
	}
	s.mark("disks")
}

// loadConfidential loads what every confidential guest has. Drivers for what this CPU has not are left out: the kernel's
// own code does the same, slower.
func (s *System) loadConfidential(initramfs *os.Root, list []listed) error {
	for _, l := range list {
		if err := loadModules(initramfs, []listed{l}, phaseConfidential, s.mark); err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	return nil
}

// loadPlatform loads the modules of the platform's own phase and mounts configfs, where they offer reports.
func (s *System) loadPlatform(initramfs *os.Root, list []listed) error {
	// A driver that does not find its device means that this is not the platform's hardware: the check of the launch says
	// so better, and refuses to go on.
	if err := loadModules(initramfs, list, string(s.launch.Platform), s.mark); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	const configfs = "/sys/kernel/config"
	if _, err := os.Stat(configfs); errors.Is(err, os.ErrNotExist) {
		return nil // the platform has no use for it; whoever needs it says so
	}
	if err := unix.Mount("configfs", configfs, "configfs", hardened, ""); err != nil {
		return fmt.Errorf("mount configfs at %s: %w", configfs, err)
	}
	return nil
}

// WaitModules waits until every module of the image is loaded and the kernel refuses further ones. Whoever mounts
// erofs or overlayfs, or waits for a disk, does so after it.
func (s *System) WaitModules(ctx context.Context) error {
	select {
	case <-s.modules:
		return s.modulesErr
	case <-ctx.Done():
		return fmt.Errorf("wait for the guest's kernel modules: %w", context.Cause(ctx))
	}
}

// Reaper reaps orphans; its Run must be called on the main thread.
func (s *System) Reaper() *Reaper { return s.reaper }

// Timeline tells what happened when since the kernel started, oldest first. Later calls may tell more.
func (s *System) Timeline() []*agentv1.BootMark {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*agentv1.BootMark, len(s.marks))
	for i, m := range s.marks {
		out[i] = &agentv1.BootMark{Name: m.Name, Micros: m.Micros}
	}
	return out
}

func (s *System) mark(name string) {
	var now unix.Timespec
	// The kernel refuses only clocks that it does not know.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	micros := uint64(now.Nano()) / 1000
	s.mu.Lock()
	defer s.mu.Unlock()
	s.marks = append(s.marks, &agentv1.BootMark{Name: name, Micros: micros})
}

// crngReady reports whether the kernel's random number generator is seeded.
func crngReady() (bool, error) {
	var b [1]byte
	for {
		_, err := unix.Getrandom(b[:], unix.GRND_NONBLOCK)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false, nil
		default:
			return false, fmt.Errorf("getrandom: %w", err)
		}
	}
}
