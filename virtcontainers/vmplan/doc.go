// SPDX-License-Identifier: Apache-2.0

// Package vmplan says how a pod's VM is launched: which VMM, which platform, how large, which boot files, parameters and
// devices. It is the way from a pod's configuration to a hypervisor.Document and nothing further: it starts nothing.
//
// # From configuration to document
//
//	New        configuration and pod → Plan: driver, platform and initdata chosen and checked; files are read
//	CheckFiles the files that the VM needs, every one that is missing told at once
//	Probe      what the host lacks for the platform
//	Host       what the document leaves to the host: accelerator, vsock transport and id, vhost-net, the unpacked kernel
//	Document   all of it as a document; a pure function
//	Prepare    the platform's part, and the measurement that is predicted of the launch
//
// Plan.Dry is the same without the host, for tools: what is measured and what is started come from the same functions, so
// that they cannot differ. A platform is chosen by configuration and never replaced by another.
//
// # States and locks
//
// A Plan is made by New and never changed; all methods may be called from any goroutine.
//
// # Trust
//
// Host side. The node's configuration is trusted, annotations were filtered by package configs, initdata is the pod
// owner's and checked here for errors only: the guest checks it for itself. What the guest says of its launch (CheckHello)
// is compared to find a wrong guest image; it protects nobody from a hostile guest.
package vmplan
