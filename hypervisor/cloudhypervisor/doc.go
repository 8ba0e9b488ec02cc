// SPDX-License-Identifier: Apache-2.0

// Package cloudhypervisor says how Cloud Hypervisor is run for a hypervisor.Document, and which documents it cannot serve. All
// of it is pure: nothing is started, no file is opened and there is no state. It is no hypervisor.Driver yet.
//
// Cloud Hypervisor is driven by requests over its API socket: vm.create has everything but the NICs; each NIC is a vm.add-net
// of its own, since the tap's file travels beside that request and numbers of files in vm.create are dropped; vm.boot lets the
// guest run. Names and types of what is sent are those of Cloud Hypervisor's OpenAPI document; its version was not
// compared with v53's. None of it was ever sent to a real Cloud Hypervisor.
package cloudhypervisor
