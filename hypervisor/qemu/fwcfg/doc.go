// SPDX-License-Identifier: Apache-2.0

// Package fwcfg reads items of a QEMU's firmware configuration device (fw_cfg: QEMU docs/specs/fw_cfg.rst) as the guest's
// firmware would get them, by the line protocol of -qtest (comment at the head of QEMU's softmmu/qtest.c).
//
// Its one use is ACPITables: a machine is started under emulation, its firmware runs until it takes the ACPI tables, and
// the tables are read and the machine ends. The machine is this host's own; its firmware is what the configuration names.
// What QEMU and firmware answer is bounded.
package fwcfg
