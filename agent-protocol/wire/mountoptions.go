// SPDX-License-Identifier: Apache-2.0

package wire

// MountOptions are the flags that a mount of a container may have, whatever it is: those of mount(8) that libcontainer knows,
// without the ones that name files or move things (remount, idmap). The host announces them (OCI runtime features), the guest
// takes no others.
var MountOptions = []string{
	"defaults", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
	"silent", "loud", "iversion", "noiversion", "lazytime", "nolazytime", "symfollow", "nosymfollow",
	"rro", "rrw", "rsuid", "rnosuid", "rdev", "rnodev", "rexec", "rnoexec", "rdiratime", "rnodiratime",
	"rrelatime", "rnorelatime", "rnoatime", "ratime", "rstrictatime", "rnostrictatime", "rsymfollow", "rnosymfollow",
	"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable",
}
