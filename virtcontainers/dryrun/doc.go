// SPDX-License-Identifier: Apache-2.0

// Package dryrun says what a pod's start would do, without doing it:
//
//	Check      what this node offers for running pods and what is missing, each thing with its fix
//	Plan       the VM that would be started for a pod, the VMM's command line, and what becomes of the pod's volumes
//	Measure    what the hardware would report of such VMs
//
// It decides nothing: what a pod is refused for, what becomes of a mount and what a VM looks like are asked from the code
// that starts pods (virtcontainers, vmplan, the platform, the VMM's driver). Its own are the way from a Pod's manifest to
// what containerd would hand over, and the reports. Nothing is started or changed on the node, with one exception that must
// be asked for: Tables.FromVMM starts emulated machines up to their firmware.
//
// Values have JSON tags: programs read them. Texts in them are for people.
//
// # States and locks
//
// None: all functions may be called from any goroutine.
//
// # Trust
//
// The node's configuration is trusted. A manifest is a file from somebody (package manifest bounds it): no file that it
// names is opened, and what it says ends up in texts and in the plan, as a pod's would.
package dryrun
