// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"strings"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
)

// confidentialFaults are the settings that no confidential platform can be combined with. They make errors that people can
// act on, before anything is made; the guest's agent has rules of its own, and the hardware measures.
func confidentialFaults(cfg *configs.Config, name tee.Name) (faults tee.Faults) {
	if cfg.Log.DebugConsole {
		faults.Add("log.debug_console", "set it to false",
			"is true with tee.platform = %q: the host would read what the guest writes to its console", name)
	}
	if want := name.Architecture(); want != "" && cfg.Architecture() != want {
		key := "hypervisor.arch"
		if cfg.Hypervisor.Arch == "" {
			key = "tee.platform"
		}
		faults.Add(key, "run on a machine of that architecture, or choose another platform ("+abi.KnownPlatforms()+")",
			"guests are of the architecture %s, and platform %q is of %s", cfg.Architecture(), name, want)
	}
	if name.Protected() && cfg.Hypervisor.Accel == configs.AccelTCG {
		faults.Add("hypervisor.accel", "set it to \""+configs.AccelAuto+"\" or \""+configs.AccelKVM+"\"",
			"is %q with tee.platform = %q: an emulated CPU protects nothing", configs.AccelTCG, name)
	}
	return faults
}

// LaunchFaults are the settings of a pod that the launch cannot have, whatever the platform is: words that only the launch
// says to the guest, and initdata that nothing binds. They are checked for a pod and not for a node: a node's initdata is
// for those of its handlers that name a confidential platform.
func LaunchFaults(cfg *configs.Config, name tee.Name) (faults tee.Faults) {
	for _, p := range cfg.Hypervisor.KernelParams {
		// As the agent looks at them: quotes do not make another word of it.
		if strings.Contains(p, wire.ParamTEE) || strings.Contains(p, wire.ParamInitdata) {
			faults.Add("hypervisor.kernel_params", "remove it", "has %q: the launch alone says this to the guest", p)
		}
	}
	if !name.Confidential() && (cfg.TEE.InitdataAnnotation != "" || cfg.TEE.Initdata != "") {
		faults.Add("tee.initdata", "choose a confidential platform, or take initdata away",
			"initdata is given and tee.platform = %q: nothing binds it to the launch of an ordinary VM", tee.None)
	}
	return faults
}
