// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"os"
	"slices"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// optionsFile stands for a file in the faults of containerd's ConfigBody.
const optionsFile = "containerd's runtime options"

// FromOptions loads the configuration that containerd's runtime options ask for. containerd gives a runtime whose
// options it does not know a runtimeoptions.v1.Options (containerd/internal/cri/config, GenerateRuntimeOptions):
//
//   - with ConfigPath: that file and the drop-ins beside it, as Load does;
//   - else with ConfigBody, the handler's whole [options] table as TOML: its keys, laid over what Load("") gives;
//   - neither, or no options at all: Load("").
//
// runc's own options, which several clients give to any runtime, are taken as none (RuncOptions). Options of another type are
// refused. Errors are of type Faults.
func FromOptions(options *anypb.Any) (*Config, error) {
	return fromOptions(options, os.Getenv(PathVariable), DefaultPath)
}

// fromOptions is FromOptions; path, where not empty, is the node's file in defaultPath's place.
func fromOptions(options *anypb.Any, path, defaultPath string) (*Config, error) {
	if options == nil || options.GetTypeUrl() == "" {
		return load(path, defaultPath, nil)
	}
	if _, runc, err := RuncOptions(options); err != nil {
		return nil, err
	} else if runc {
		return load(path, defaultPath, nil)
	}
	var o runtimeoptions.Options
	if !typeurl.Is(options, &o) && !options.MessageIs(&o) {
		return nil, Faults{{File: optionsFile, Reason: fmt.Sprintf("are of type %q", clip(options.GetTypeUrl())),
			Fix: "give runtimeoptions.v1.Options: in containerd's configuration only ConfigPath, TypeUrl and Cloister's own keys, on ctr's " +
				"command line only --runtime-config-path"}}
	}
	if err := proto.Unmarshal(options.GetValue(), &o); err != nil {
		return nil, Faults{{File: optionsFile, Reason: "cannot be decoded: " + err.Error(), Fix: "use a containerd of version 2.0 or later"}}
	}
	if o.GetConfigPath() != "" {
		if p := absolutePath(o.GetConfigPath()); p != nil {
			return nil, Faults{{File: optionsFile, Key: "ConfigPath", Reason: p.reason, Fix: p.fix}}
		}
		return load(o.GetConfigPath(), defaultPath, nil)
	}
	body, err := configBody(o.GetConfigBody())
	if err != nil {
		return nil, err
	}
	return load(path, defaultPath, body)
}

// RuncOptions reports whether options are runc's own, which several clients give to any runtime, and which of them are set:
// they mean nothing to Cloister. One that asks for another program to run is an error of type Faults.
func RuncOptions(options *anypb.Any) (ignored []string, runc bool, err error) {
	var o runcoptions.Options
	if options.GetTypeUrl() == "" || !typeurl.Is(options, &o) && !options.MessageIs(&o) {
		return nil, false, nil
	}
	if err := proto.Unmarshal(options.GetValue(), &o); err != nil {
		return nil, true, Faults{{File: optionsFile, Reason: "cannot be decoded: " + err.Error(),
			Fix: "use a containerd of version 2.0 or later"}}
	}
	if o.GetBinaryName() != "" {
		return nil, true, Faults{{File: optionsFile, Key: "BinaryName", Reason: fmt.Sprintf("asks for the program %q", clip(o.GetBinaryName())),
			Fix: "leave it out: no such program runs a VM's containers"}}
	}
	o.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		ignored = append(ignored, string(field.Name()))
		return true
	})
	slices.Sort(ignored)
	return ignored, true, nil
}

// configBody takes out containerd's own keys, which stand in the same table as the runtime's. It decodes and encodes
// only where there are any, for the sake of line numbers.
func configBody(data []byte) (*layer, error) {
	if len(data) == 0 {
		return nil, nil
	}
	if len(data) > maxFileBytes {
		return nil, Faults{{File: optionsFile, Key: "ConfigBody", Reason: fmt.Sprintf("is larger than %d bytes", maxFileBytes),
			Fix: "use ConfigPath"}}
	}
	doc := map[string]any{}
	if err := toml.Unmarshal(data, &doc); err != nil {
		// merge finds and reports the same error with its line.
		return &layer{optionsFile, data}, nil
	}
	before := len(doc)
	for _, own := range []string{"TypeUrl", "ConfigPath", "ConfigBody"} {
		delete(doc, own)
	}
	if len(doc) == before {
		return &layer{optionsFile, data}, nil
	}
	rest, err := toml.Marshal(doc)
	if err != nil {
		return nil, Faults{{File: optionsFile, Key: "ConfigBody", Reason: err.Error(), Fix: "use ConfigPath"}}
	}
	return &layer{optionsFile, rest}, nil
}
