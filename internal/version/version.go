// SPDX-License-Identifier: Apache-2.0

package version

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Version is what `git describe` said when the binary was built; the Makefile sets it with the linker's -X. It is a
// variable for that reason only and never assigned to in code.
var Version = "unknown"

// String is the version with what it was built by, in one line: "v0.1.0 (go1.26.8 linux/amd64)".
func String() string {
	v := Version
	if v == "unknown" {
		// `go install module@version` has no linker flags, but records the module's version.
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
			v = info.Main.Version
		}
	}
	return fmt.Sprintf("%s (%s %s/%s)", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
