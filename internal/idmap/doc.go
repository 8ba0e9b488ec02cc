// SPDX-License-Identifier: Apache-2.0

// Package idmap has the mappings of user namespaces: which user and group outside of a namespace one in it is. The host and the
// guest use them to mount what containers of such a namespace see under its own ids (MOUNT_ATTR_IDMAP, mount_setattr(2)): what
// belongs to root then belongs to the container's root, and what that one makes belongs to root.
//
// A Map is a value without a state. Open makes a namespace that lives as long as the file; the process that it is made with is
// gone before Open returns.
//
// In the guest a Map comes from the host, as all of a specification: it decides who a container's users are among the guest's, and
// nothing about what they may do outside of their namespace. The kernel refuses maps that overlap or are too long.
package idmap
