// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestScopeOfSysctl(t *testing.T) {
	for key, want := range map[string]SysctlScope{
		"net.ipv4.ip_forward": SysctlNetwork, "kernel.shm_rmid_forced": SysctlIPC, "kernel.msgmax": SysctlIPC, "kernel.sem": SysctlIPC,
		"fs.mqueue.msg_max": SysctlIPC, "kernel.domainname": SysctlUTS,
		"": SysctlRefused, "net": SysctlRefused, "kernel.panic": SysctlRefused, "kernel.shm.x": SysctlRefused, "kernel.sem.x": SysctlRefused,
		"kernel.hostname": SysctlRefused, "vm.overcommit_memory": SysctlRefused,
	} {
		require.Equal(t, want, ScopeOfSysctl(key), key)
	}
}
