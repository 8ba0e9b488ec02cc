// SPDX-License-Identifier: Apache-2.0

// Package hotplug keeps account of what comes to a running VM and goes: which ids, serial numbers and places are taken, and
// which disk is being added or removed. It knows no VMM; a driver reserves here before it asks its VMM for anything.
//
//	           Reserve                 Keep                 Take
//	(absent) ──────────► being added ───────► in the VM ◄─────────► being removed ──Release──► (absent)
//	    ▲                     │                            Keep
//	    └──────Release────────┘
//
// Each table has a lock of its own, held for a look at the table alone.
package hotplug
