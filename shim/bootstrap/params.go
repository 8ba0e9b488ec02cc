// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// maxInputBytes is containerd's own limit of stdin.
	maxInputBytes = 10 << 20

	// apiVersion is what this binary serves: Task version 3 and the sandbox API.
	apiVersion = 3
	protocol   = "ttrpc"

	// runtimeOptionsType is the type of options that containerd gives to runtimes it does not know.
	runtimeOptionsType = "runtimeoptions.v1.Options"
)

// dialect is how the caller talks.
type dialect int

const (
	dialectProtobuf dialect = iota // containerd 2.3 and later
	dialectJSON                    // containerd 2.0 to 2.2
	dialectAddress                 // containerd 1.x
)

// params is what `start` is told, in whichever dialect.
type params struct {
	dialect                      dialect
	id, namespace                string
	grpcAddress, ttrpcAddress    string
	socketDir                    string
	debug                        bool
	options                      *anypb.Any
	containerdVersion, publisher string
}

// readParams reads stdin once and completes it with the command line.
func readParams(c Command) (params, error) {
	input, err := io.ReadAll(io.LimitReader(c.Stdin, maxInputBytes+1))
	if err != nil {
		return params{}, fmt.Errorf("read stdin: %w", err)
	}
	if len(input) > maxInputBytes {
		return params{}, fmt.Errorf("stdin has more than %d bytes: %w", maxInputBytes, errdefs.ErrInvalidArgument)
	}
	p, err := parseInput(input, c.ID, c.Namespace)
	if err != nil {
		return params{}, err
	}
	p.id, p.namespace = c.ID, c.Namespace
	p.debug = p.debug || c.Debug
	// What protobuf parameters lack, a caller may still have on its command line and in the environment.
	p.grpcAddress, p.ttrpcAddress = cmp.Or(p.grpcAddress, c.GRPCAddress), cmp.Or(p.ttrpcAddress, c.TTRPCAddress)
	if p.ttrpcAddress == "" && p.grpcAddress != "" {
		p.ttrpcAddress = p.grpcAddress + ".ttrpc" // containerd's default (cmd/containerd/server/config)
	}
	if p.dialect == dialectProtobuf {
		return p, nil
	}
	p.publisher = c.PublishBinary
	if c.MajorVersion(c.PublishBinary) == 1 {
		p.dialect = dialectAddress
	}
	return p, nil
}

// parseInput tells the dialects apart. It never fails for what some containerd writes.
func parseInput(input []byte, id, namespace string) (params, error) {
	if len(input) == 0 {
		return params{dialect: dialectJSON}, nil
	}
	boot := &bootapi.BootstrapParams{}
	bootErr := proto.Unmarshal(input, boot)
	if bootErr == nil && boot.GetInstanceID() == id && boot.GetNamespace() == namespace {
		return params{
			dialect:           dialectProtobuf,
			grpcAddress:       boot.GetContainerdGrpcAddress(),
			ttrpcAddress:      boot.GetContainerdTtrpcAddress(),
			socketDir:         boot.GetSocketDir(),
			debug:             boot.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG,
			options:           optionsOf(boot.GetExtensions()),
			containerdVersion: boot.GetContainerdVersion(),
		}, nil
	}
	options := &anypb.Any{}
	switch err := proto.Unmarshal(input, options); {
	case err != nil:
		return params{}, fmt.Errorf("stdin has neither bootstrap parameters nor runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	case len(options.ProtoReflect().GetUnknown()) > 0 || options.GetTypeUrl() == "":
		// Parameters of another instance decode as options with unknown fields.
		return params{}, fmt.Errorf("stdin has bootstrap parameters of %.100q in namespace %.100q, the command line says %q and %q: %w",
			boot.GetInstanceID(), boot.GetNamespace(), id, namespace, errdefs.ErrInvalidArgument)
	}
	return params{dialect: dialectJSON, options: options}, nil
}

// optionsOf finds the runtime options among the extensions. Options of a type that we do not know are kept: package
// configs says what is wrong with them, to whoever wants a pod.
func optionsOf(extensions []*bootapi.Extension) *anypb.Any {
	var other *anypb.Any
	for _, e := range extensions {
		v := e.GetValue()
		if v.MessageName() == runtimeOptionsType || v.GetTypeUrl() == runtimeOptionsType {
			return v
		}
		if strings.HasSuffix(v.GetTypeUrl(), ".Options") {
			other = v
		}
	}
	return other
}

// answer encodes the result of `start` for the caller.
func (p params) answer(address string, version int32, capabilities *types.MountCapabilities) ([]byte, error) {
	result := &bootapi.BootstrapResult{Version: version, Address: address, Protocol: protocol}
	switch p.dialect {
	case dialectAddress:
		return []byte(address), nil
	case dialectJSON:
		// Written out rather than encoded from the message: containerd 2.0 to 2.2 know these three keys.
		return json.Marshal(struct {
			Version  int32  `json:"version"`
			Address  string `json:"address"`
			Protocol string `json:"protocol"`
		}{version, address, protocol})
	}
	if err := result.AddExtension(capabilities); err != nil {
		return nil, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(result)
}
