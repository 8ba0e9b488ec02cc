// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
)

const (
	// apiFD and eventFD are what the VMM inherits, behind the standard files.
	apiFD   = 3
	eventFD = 4

	apiRoot   = "/api/v1/"
	vsockName = "vsock"

	imageRaw = "Raw"
	// modeTTY writes to standard output, from where the owner reads the console with a bound of its own.
	modeTTY = "Tty"
	modeOff = "Off"
	// onePair is a queue to send and one to receive.
	onePair = 2
)

// Invocation returns how a binary is run for a document, with its sockets in stateDir. The requests stand in the order in
// which they are sent; beside each vm.add-net goes the tap's file of the NIC in the same place of doc.NICs. The error is
// Validate's.
func Invocation(doc hypervisor.Document, binary, stateDir string) (hypervisor.Invocation, error) {
	if err := Validate(doc); err != nil {
		return hypervisor.Invocation{}, err
	}
	inv := hypervisor.Invocation{
		Binary: binary,
		Args: []string{
			"--api-socket", "fd=" + strconv.Itoa(apiFD),
			"--event-monitor", "fd=" + strconv.Itoa(eventFD),
			"--seccomp", strconv.FormatBool(doc.Sandboxed),
		},
		Files: []hypervisor.InheritedFile{
			{FD: apiFD, Name: "api", What: "the listening socket of the API"},
			{FD: eventFD, Name: "events", What: "the pipe that takes the event monitor's reports"},
		},
	}
	type call struct {
		name string
		body any
	}
	calls := []call{{"vm.create", create(doc, stateDir)}}
	for _, n := range doc.NICs {
		calls = append(calls, call{"vm.add-net", netConfig{ID: n.ID, MAC: n.MAC, MTU: n.MTU, NumQueues: onePair}})
	}
	calls = append(calls, call{name: "vm.boot"})
	for _, c := range calls {
		r := hypervisor.Request{Method: http.MethodPut, Path: apiRoot + c.name}
		if c.body != nil {
			body, err := json.Marshal(c.body)
			if err != nil {
				return hypervisor.Invocation{}, fmt.Errorf("request %s: %w", c.name, err)
			}
			r.Body = body
		}
		inv.Requests = append(inv.Requests, r)
	}
	return inv, nil
}

func create(doc hypervisor.Document, stateDir string) vmConfig {
	c := vmConfig{
		CPUs:   cpusConfig{Boot: doc.CPU.Count, Max: doc.CPU.Count},
		Memory: memoryConfig{Size: doc.Memory.Bytes, Shared: doc.Memory.Shared},
		Payload: payloadConfig{
			Kernel: doc.Boot.Kernel, Initramfs: doc.Boot.Initrd, Cmdline: strings.Join(doc.Boot.Parameters, " "),
		},
		RNG:      rngConfig{Src: "/dev/urandom"},
		Serial:   consoleConfig{Mode: modeTTY},
		Console:  consoleConfig{Mode: modeOff},
		Vsock:    vsockConfig{CID: doc.Vsock.CID, Socket: filepath.Join(stateDir, vsockName)},
		PVPanic:  true,
		Platform: platformConfig{SystemUUID: doc.UUID},
	}
	for _, d := range doc.Disks {
		c.Disks = append(c.Disks, diskConfig{ID: d.ID, Path: d.Path, ReadOnly: d.ReadOnly, Serial: d.Serial, ImageType: imageRaw})
	}
	return c
}
