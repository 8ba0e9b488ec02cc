// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// DecodeContainer reads an OCI runtime configuration.
func DecodeContainer(raw []byte) (*specs.Spec, error) { return decode[specs.Spec](raw, "spec") }

// DecodeProcess reads an OCI process object.
func DecodeProcess(raw []byte) (*specs.Process, error) { return decode[specs.Process](raw, "process") }

// DecodeResources reads OCI LinuxResources.
func DecodeResources(raw []byte) (*specs.LinuxResources, error) {
	return decode[specs.LinuxResources](raw, "resources")
}

// decode reads exactly one JSON value of bounded size.
func decode[T any](raw []byte, what string) (*T, error) {
	if len(raw) > wire.MaxSpec {
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d: %w", what, len(raw), wire.MaxSpec, errdefs.ErrInvalidArgument)
	}
	var in T
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, fmt.Errorf("%s is not valid JSON (%w): %w", what, err, errdefs.ErrInvalidArgument)
	}
	return &in, nil
}
