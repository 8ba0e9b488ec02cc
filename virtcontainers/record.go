// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/internal/procid"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/hostcgroup"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

// recordName is the file in a sandbox's bundle that tells what the sandbox holds on the host.
const recordName = "cloister.json"

// record is what Cleanup needs when the shim was killed. What dies with the shim or with its own last user (the VMM,
// taps, virtiofsd and its mounts, a network namespace made by the shim) is here only where somebody must wait for it.
type record struct {
	ID        string       `json:"id"`
	StateDir  string       `json:"state_dir"`
	Scratch   string       `json:"scratch,omitempty"`
	NetNSPath string       `json:"netns_path,omitempty"`
	Cgroup    string       `json:"cgroup,omitempty"`
	VMM       *processRef  `json:"vmm,omitempty"`
	Hooks     *specs.Hooks `json:"hooks,omitempty"`
}

// processRef is how a record keeps a procid.Ref. Records of running pods outlive an upgrade of the shim: the form stays.
type processRef struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start,string"`
}

// saveRecord writes what Start has made so far into the pod's record, by atomic rename.
func (p *Pod) saveRecord(made *running) error {
	r := record{ID: p.cfg.ID, StateDir: p.stateDir, Scratch: p.plan.ScratchFile(), Hooks: p.cfg.Hooks}
	if p.cfg.Network == NetworkPath {
		r.NetNSPath = p.cfg.NetNSPath
	}
	if made.cgroup != nil {
		r.Cgroup = made.cgroup.Path()
	}
	if pid := made.vmmPID; pid != 0 {
		ref, err := procid.Of(pid)
		if err != nil {
			return err
		}
		vmm := processRef(ref)
		r.VMM = &vmm
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(p.cfg.Bundle, recordName)
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("record of the sandbox: %w", err)
	}
	return os.Rename(path+".tmp", path)
}

func removeRecord(bundle string) { _ = os.Remove(filepath.Join(bundle, recordName)) }

// Cleanup removes what a sandbox whose shim has died left on the host, from the record in its bundle alone. A bundle
// without one has nothing to remove. It may be repeated; all faults are reported together.
func Cleanup(ctx context.Context, bundle string) error {
	b, err := os.ReadFile(filepath.Join(bundle, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(bundle, recordName), err)
	}
	var faults []error
	if r.VMM != nil {
		if err := endVMM(ctx, procid.Ref(*r.VMM)); err != nil {
			faults = append(faults, err)
		}
	}
	if err := network.Cleanup(r.NetNSPath, r.ID); err != nil {
		faults = append(faults, err)
	}
	if r.Cgroup != "" {
		if err := hostcgroup.DeleteByPath(ctx, r.Cgroup); err != nil {
			faults = append(faults, err)
		}
	}
	if r.Hooks != nil {
		hooks.Poststop(ctx, r.Hooks, hookState(r.ID, bundle, 0, nil))
	}
	if r.StateDir != "" {
		if err := os.RemoveAll(r.StateDir); err != nil {
			faults = append(faults, err)
		}
	}
	if err := removeScratch(r.Scratch); err != nil {
		faults = append(faults, err)
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	removeRecord(bundle)
	return nil
}

// endVMM kills the process, if it is still the one that was meant, and waits until it is gone.
func endVMM(ctx context.Context, ref procid.Ref) error {
	vmm, err := ref.Open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer vmm.Close()
	log.G(ctx).WithField("pid", ref.PID).Warn("the VMM outlived its shim; killing it")
	_, err = vmm.End(ctx, 0)
	return err
}
