// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// snpFeatures are what a Cloud Hypervisor must have been built with for SEV-SNP; released binaries are not.
var snpFeatures = []string{"fw_cfg", "igvm", "kvm", "sev_snp"}

// pingReply is the schema VmmPingResponse, as far as it is used.
type pingReply struct {
	Features []string `json:"features"`
}

// checkFeatures asks the VMM what it was built with. errdefs.ErrNotImplemented: not for SEV-SNP.
func (v *vm) checkFeatures(ctx context.Context) error {
	body, err := v.client.Do(ctx, hypervisor.Request{Method: http.MethodGet, Path: apiRoot + "vmm.ping"})
	if err != nil {
		return err
	}
	var reply pingReply
	if err := json.Unmarshal(body, &reply); err != nil {
		return fmt.Errorf("the VMM's answer to vmm.ping: %w", err)
	}
	missing := slices.DeleteFunc(slices.Clone(snpFeatures), func(f string) bool { return slices.Contains(reply.Features, f) })
	if len(missing) > 0 {
		return fmt.Errorf("this %s was built without %s, which SEV-SNP needs; build it with --features %s and set hypervisor.path, or choose "+
			"hypervisor.kind = \"qemu\": %w", name, strings.Join(missing, ", "), strings.Join(snpFeatures, ","), errdefs.ErrNotImplemented)
	}
	return nil
}
