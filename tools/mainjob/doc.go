// SPDX-License-Identifier: Apache-2.0

// Command mainjob is the second half of `make run`: Cloister's main job, from starting containerd to a removed pod.
//
// On a machine that tools/prepare has set up, which hands over the record of what it did, it starts a private containerd
// with package harness, and through the CRI runs a pod of two containers in a micro-VM: both print, one is exec'd into, they
// reach each other over the pod's loopback, one is stopped and made anew, stats are read, the pod is removed, and
// nothing may be left. Each step is a stage with its time. Any failure ends it with status 1 and the reason; only when
// all of it happened is the last line "main job: ok".
//
// That a VM ran is proved, not assumed: kernel release, boot id and PID 1 as a container sees them are compared with
// the host's. CLOISTER_MAINJOB_HANDLER=runc runs the same job with runc, where the proof must fail: that shows that it
// can.
//
// With -keep the pod is left up, and -stop ends what was kept.
package main
