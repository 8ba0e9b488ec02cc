// SPDX-License-Identifier: Apache-2.0

// Package sample is the platform for tests and for learning: a VM under all rules of a confidential one, and no hardware
// behind them. IT PROTECTS NOTHING, and says so wherever it shows.
//
// What a real platform keeps in a register that the hardware reports, initdata's binding, stands on the kernel's command
// line here (wire.ParamInitdata), so that the guest checks its document by the same code. In an image that was sealed for
// this platform both parameters are in the image already, and Prepare adds nothing.
package sample
