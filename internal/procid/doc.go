// SPDX-License-Identifier: Apache-2.0

// Package procid identifies processes for good. A pid is used again once its process has been reaped; together with the
// time at which the process started (field 22 of /proc/PID/stat) it names one process until the machine restarts.
//
// A Ref is what can be kept, on disk too: whoever keeps one gives it its own JSON form. Open turns it into a Process, a
// pidfd that has been checked to be of the process that was meant, through which it is waited for and killed: no signal
// ever reaches another process that has the pid by now.
//
// ReadStat is the only reader of /proc/PID/stat.
//
// A Ref and a Stat are values. A Process has one state, open until Close, and no locks: Wait, Signal and End may be called
// by several goroutines at once, Close after they have returned.
//
// It trusts the kernel alone. The name that a process gives itself stands in the middle of /proc/PID/stat and may hold
// anything.
package procid
