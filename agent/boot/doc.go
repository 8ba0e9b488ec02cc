// SPDX-License-Identifier: Apache-2.0

// Package boot brings the guest up as its PID 1 and takes it down again.
//
// # Order
//
// Init runs once, in the initramfs, with nothing mounted: it makes a root on tmpfs with the kernel's file systems in
// it, moves there, loads the modules that vsock needs and sets the kernel up as a container host. Everything is
// measured (System.Timeline). Modules that only later steps need are loaded in the background, so that the host's
// answer to the agent's first word and the loading go on side by side: WaitModules is the gate that later steps stand
// behind. After the last one the kernel loads no module any more, ever (kernel.modules_disabled).
//
// # The root
//
// libcontainer's pivot_root does not work while the root is the initramfs itself, since that mount has no parent. The
// new root is an own tmpfs moved over it. The agent's executable is not copied: its directory is bind mounted from the
// initramfs, whose other files are deleted. Its path stays true after the move, which libcontainer's sealing of
// /proc/self/exe by overlayfs relies on (CVE-2019-5736).
//
// # Reaping
//
// PID 1 inherits orphans and must wait for them, yet must not take the exit status of a process that somebody in the
// agent waits for (os/exec, libcontainer). Linux helps to tell the two apart: a child belongs to the thread that forked
// it, also if CLONE_PARENT was used below it (libcontainer's nsexec), but orphans go to the main thread of PID 1. The
// Reaper runs on the main thread, which never forks, and looks at that thread's children only. See Reaper for what else
// comes to the main thread, and what is done about it.
//
// # Trust
//
// The initramfs is measured with the launch of a confidential guest and trusted. What the host asks for later
// (hostname, sysctls, clock) is checked here against an allow-list. Of the kernel's command line package launch reads the
// words that say what kind of guest this is; in a confidential guest it is measured.
//
// The wall clock is the host's in a confidential guest, too: it can be set to any time at any moment. Nothing whose safety
// depends on the time (the age of certificates, of evidence) may trust it alone.
//
// Random numbers come from the CPU (random.trust_cpu): the image has no driver of a device that gives the host's, and what
// a boot loader hands over is mixed in but counts for nothing (random.trust_bootloader=off). Without RDRAND, or TRNG on
// s390x, reads wait until the kernel has gathered enough from timings.
//
// # Confidential guests
//
// All modules are loaded before Init returns, those of the platform's phase last, and module loading is locked; then the
// launch is checked (package launch) and only then the host hears of the guest. What fails on the way is told in
// Hello.refusal, and the guest ends.
//
// # Locks
//
// System.mu guards the timeline only and is never held over a system call that can block.
package boot
