// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"embed"
	"fmt"
)

//go:embed platforms/*.toml
var platformFiles embed.FS

// PlatformDropIn is the commented drop-in of a platform, the start of a node's own. "none" has none.
func PlatformDropIn(platform string) ([]byte, error) {
	data, err := platformFiles.ReadFile("platforms/" + platform + ".toml")
	if err != nil {
		return nil, fmt.Errorf("there is no drop-in for platform %q", clip(platform))
	}
	return data, nil
}
