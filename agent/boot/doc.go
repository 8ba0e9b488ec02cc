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
// new root is an own tmpfs moved over it. The agent's executable is not copied: its folder is bind mounted from the
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
// (hostname, sysctls, clock) is checked here against an allow-list. The kernel command line is read by nothing here.
//
// # Locks
//
// System.mu guards the timeline only and is never held over a system call that can block.
package boot
