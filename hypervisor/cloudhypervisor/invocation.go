// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

const (
	// apiFD and eventFD are what the VMM inherits.
	apiFD   = supervise.FirstInheritedFD
	eventFD = supervise.FirstInheritedFD + 1

	apiRoot = "/api/v1/"
)

// newInvocation is how a binary is run for a valid document, with its sockets in stateDir. The requests stand in the order in
// which they are sent; beside each vm.add-net goes the tap's file of the NIC in the same place of doc.NICs. The last one,
// vm.boot, is VM.Boot's.
func newInvocation(doc hypervisor.Document, binary, stateDir string) (hypervisor.Invocation, error) {
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
	create, err := request("vm.create", newVMConfig(doc, stateDir))
	if err != nil {
		return hypervisor.Invocation{}, err
	}
	inv.Requests = append(inv.Requests, create)
	for _, n := range doc.NICs {
		add, err := request("vm.add-net", netConfig{ID: nicID(n.ID), MAC: n.MAC, MTU: n.MTU, NumQueues: onePair})
		if err != nil {
			return hypervisor.Invocation{}, err
		}
		inv.Requests = append(inv.Requests, add)
	}
	boot, err := request("vm.boot", nil)
	inv.Requests = append(inv.Requests, boot)
	return inv, err
}

// request is a call of the API; a nil body is none.
func request(name string, body any) (hypervisor.Request, error) {
	r := hypervisor.Request{Method: http.MethodPut, Path: apiRoot + name}
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return hypervisor.Request{}, fmt.Errorf("request %s: %w", name, err)
		}
		r.Body = b
	}
	return r, nil
}
