// SPDX-License-Identifier: Apache-2.0

package criv1

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// TypeURL of the sandbox configuration, as containerd's typeurl package writes it for
	// k8s.io/cri-api/pkg/apis/runtime/v1.PodSandboxConfig.
	TypeURL = "runtime.v1.PodSandboxConfig"

	// UpdatedResourcesKey is the sandbox extension, and UpdatedResourcesTypeURL its type, by which containerd tells of
	// a pod's new limits (containerd/internal/cri/server/podsandbox/helpers.go). Its value is JSON.
	UpdatedResourcesKey     = "updated-resources"
	UpdatedResourcesTypeURL = "io.containerd.cri.v1/UpdatedResources"

	// maxConfigBytes is ttrpc's limit of a message; a caller that does not come through ttrpc has it as well.
	maxConfigBytes = 4 << 20
)

// Decode reads CreateSandbox's options. No options give an empty configuration: `ctr` and tests have none. Options of
// another type, or that are too large or malformed, give errdefs.ErrInvalidArgument.
func Decode(options *anypb.Any) (*PodSandboxConfig, error) {
	config := &PodSandboxConfig{}
	if options == nil || (options.GetTypeUrl() == "" && len(options.GetValue()) == 0) {
		return config, nil
	}
	if u := options.GetTypeUrl(); u != TypeURL && u != "type.googleapis.com/"+TypeURL {
		return nil, fmt.Errorf("the sandbox's options are of type %.200q, want %q: %w", u, TypeURL, errdefs.ErrInvalidArgument)
	}
	if n := len(options.GetValue()); n > maxConfigBytes {
		return nil, fmt.Errorf("the sandbox's options have %d bytes, at most %d are read: %w", n, maxConfigBytes, errdefs.ErrInvalidArgument)
	}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(options.GetValue(), config); err != nil {
		return nil, fmt.Errorf("decode the sandbox's options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// UpdatedResources are a pod's new limits.
type UpdatedResources struct {
	Overhead  *LinuxContainerResources
	Resources *LinuxContainerResources
}

// DecodeUpdate reads the extension UpdatedResourcesKey. Errors are errdefs.ErrInvalidArgument.
func DecodeUpdate(extension *anypb.Any) (*UpdatedResources, error) {
	if u := extension.GetTypeUrl(); u != UpdatedResourcesTypeURL {
		return nil, fmt.Errorf("the sandbox's new resources are of type %.200q, want %q: %w", u, UpdatedResourcesTypeURL,
			errdefs.ErrInvalidArgument)
	}
	if n := len(extension.GetValue()); n > maxConfigBytes {
		return nil, fmt.Errorf("the sandbox's new resources have %d bytes, at most %d are read: %w", n, maxConfigBytes,
			errdefs.ErrInvalidArgument)
	}
	// encoding/json of the generated structures on both sides: the field names are those of the json tags.
	var u UpdatedResources
	if err := json.Unmarshal(extension.GetValue(), &u); err != nil {
		return nil, fmt.Errorf("decode the sandbox's new resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &u, nil
}
