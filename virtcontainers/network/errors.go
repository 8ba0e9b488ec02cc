// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// UnsupportedError says that a network set-up cannot be given to a VM. It is an errdefs.ErrNotImplemented.
type UnsupportedError struct {
	// What was asked for: "host network", `interface "tun0" of kind tun`.
	What string
	// Reason is why it cannot be had.
	Reason string
	// Fix is what to do.
	Fix string
}

func (e *UnsupportedError) Error() string {
	return e.What + " is not supported: " + e.Reason + "; " + e.Fix
}

// Unwrap makes errdefs.IsNotImplemented true.
func (e *UnsupportedError) Unwrap() error { return errdefs.ErrNotImplemented }

// joinedError is the error for a namespace that another VM has, which device shows.
func joinedError(device string) error {
	return fmt.Errorf("the network namespace is another VM's already (device %s): a second VM cannot join it "+
		"(--network container:NAME); put the containers into one pod, or give each a network of its own: %w",
		device, errdefs.ErrAlreadyExists)
}

// HostNetworkError is the error for a pod that asks for the host's network namespace (hostNetwork: true).
func HostNetworkError() error {
	return &UnsupportedError{
		What:   "host network",
		Reason: "the pod runs in a virtual machine, which has a network stack of its own",
		Fix:    "remove hostNetwork (or --net=host), or run this pod with another runtime class",
	}
}
