// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-cloister-v2 is the shim by which containerd runs pods in micro-VMs, for the runtime
// io.containerd.cloister.v2. Build it with -tags no_grpc.
package main

import (
	"os"

	"github.com/cloister-project/cloister/shim"
)

func main() { os.Exit(shim.Main()) }
