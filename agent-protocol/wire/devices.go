// SPDX-License-Identifier: Apache-2.0

package wire

// ContainerDevices are the devices of the guest that a container gets if it asks for them, beside the standard ones, which all
// have. Host and guest go by this one list.
var ContainerDevices = []string{"/dev/fuse", "/dev/net/tun"}
