// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	configFile  = "config.json" // containerd's, the OCI specification
	addressFile = "address"     // read by containerd 1.x on restart and by pkg/shim at the end
	optionsFile = "cloister-options.pb"
	exitFile    = "cloister-exit.json"
	shimFile    = "cloister-shim.json"

	maxConfigBytes  = 16 << 20
	maxOptionsBytes = 10 << 20
	maxSmallBytes   = 64 << 10
)

// Exit is how a container's first process, or a sandbox, ended.
type Exit struct {
	PID    uint32    `json:"pid"`
	Status uint32    `json:"status"`
	At     time.Time `json:"at"`
}

// WriteExit keeps an exit for `delete`.
func WriteExit(dir string, e Exit) error {
	return writeJSON(filepath.Join(dir, exitFile), e)
}

// ReadExit returns what WriteExit kept; errdefs.ErrNotFound if nothing was.
func ReadExit(dir string) (Exit, error) {
	var e Exit
	err := readJSON(filepath.Join(dir, exitFile), maxSmallBytes, &e)
	return e, err
}

// WriteOptions keeps the runtime options for the daemon; nil options remove what an earlier `start` kept.
func WriteOptions(dir string, options *anypb.Any) error {
	path := filepath.Join(dir, optionsFile)
	if options == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := proto.Marshal(options)
	if err != nil {
		return fmt.Errorf("encode the runtime options: %w", err)
	}
	return writeFile(path, data)
}

// ReadOptions returns what WriteOptions kept, nil if there were no options.
func ReadOptions(dir string) (*anypb.Any, error) {
	data, err := readFile(filepath.Join(dir, optionsFile), maxOptionsBytes)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	options := &anypb.Any{}
	if err := proto.Unmarshal(data, options); err != nil {
		return nil, fmt.Errorf("decode %s: %w", filepath.Join(dir, optionsFile), err)
	}
	return options, nil
}

// WriteAddress keeps the shim's address: containerd 1.x looks for it when it restarts.
func WriteAddress(dir, address string) error {
	return writeFile(filepath.Join(dir, addressFile), []byte(address))
}

// Annotations of the OCI specification in dir. No specification has none: with sandboxer = "shim" containerd writes
// none for the sandbox.
func Annotations(dir string) (map[string]string, error) {
	var spec struct {
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	if err := readJSON(filepath.Join(dir, configFile), maxConfigBytes, &spec); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return spec.Annotations, nil
}

// Spec is the OCI specification in dir.
func Spec(dir string) (*specs.Spec, error) {
	spec := &specs.Spec{}
	if err := readJSON(filepath.Join(dir, configFile), maxConfigBytes, spec); err != nil {
		return nil, err
	}
	return spec, nil
}

func readJSON(path string, limit int64, v any) error {
	data, err := readFile(path, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes: %w", path, limit, errdefs.ErrInvalidArgument)
	}
	return data, nil
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, data)
}

// writeFile replaces path in one step.
func writeFile(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(data); err != nil {
		_ = f.Close()
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
