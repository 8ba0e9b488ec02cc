// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

const webPod = `# comment
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  annotations:
    io.cloister.initdata: H4sIAAAAAAACAytLLSrOzM9TsFVQMtAz1DNQ4krMSc8vyizJyAWJFWckGluYKHFFpySWJMZy5ZfnpRaBxMtTk5S4AL5uMzg8AAAA
    elsewhere.example/key: x
spec:
  runtimeClassName: cloister-snp
  containers:
  - name: web
    resources: {limits: {cpu: 1500m, memory: 200Mi}}
    volumeMounts:
    - {name: conf, mountPath: /etc/nginx}
    - {name: conf, mountPath: /etc/one.conf, subPath: one.conf}
    - {name: tmp, mountPath: /tmp}
  - name: side
    resources: {limits: {cpu: 250m}}
  volumes:
  - {name: conf, configMap: {name: web}}
  - {name: tmp, emptyDir: {}}
  - {name: spare, secret: {secretName: s}}
`

// allowInitdata lets webPod bring its own.
const allowInitdata = "[annotations]\nallowed = ['io.cloister.initdata']"

// A plan for SEV-SNP, made on any machine. Only where the C-bit lies is the machine's, and it is not measured.
func TestPlanOfAPod(t *testing.T) {
	n := newNode(t, allowInitdata)
	p, err := manifest.Parse([]byte(webPod))
	require.NoError(t, err)
	name, notes := dryrun.PlatformOf("", p)
	assert.Equal(t, "snp", name)
	assert.Empty(t, notes)
	plan, err := dryrun.Plan(t.Context(), n.load(t, name), p)
	require.NoError(t, err)
	require.ErrorContains(t, plan.Err, "the VMM could not be started", "the node's QEMU does not run")
	assert.Contains(t, plan.Err.Error(), plan.CommandError)
	assert.Equal(t, 2, plan.Document.CPU.Count)
	assert.Equal(t, uint64(200+256)<<20, plan.Document.Memory.Bytes)

	// What a VMM's driver would say; the drivers have tests of it.
	plan.CommandError = ""
	plan.Document.Confidential.SNP.CBitPosition, plan.Document.Confidential.SNP.ReducedPhysBits = 51, 1
	plan.Binary, plan.Argv = "/usr/bin/vmm", []string{"-name", "cloister-plan", "-append", "console=ttyS0 quiet", "-S"}
	plan.Files = []hypervisor.InheritedFile{{FD: 3, Name: "control", What: "socket to the shim: control"}}
	var out bytes.Buffer
	require.NoError(t, printPlan(&out, plan))
	n.golden(t, "plan-snp.golden", out.String())
	out.Reset()
	require.NoError(t, printJSON(&out, plan))
	n.golden(t, "plan-snp.json", out.String())
}

func TestPlanRefusesAll(t *testing.T) {
	n := newNode(t, "")
	file := n.write(t, "pod.yaml", `
kind: Pod
metadata: {name: bad}
spec:
  runtimeClassName: cloister-sample
  hostNetwork: true
  hostPID: true
  hostIPC: true
  initContainers:
  - name: init
    volumeMounts: [{name: host, mountPath: /first}]
  containers:
  - name: main
    resources: {limits: {nvidia.com/gpu: 1}}
    volumeDevices: [{name: raw, devicePath: /dev/xvda}]
    volumeMounts:
    - {name: data, mountPath: /data}
    - {name: host, mountPath: /host, mountPropagation: Bidirectional}
    - {name: tmp, mountPath: /tmp, subPath: a}
    - {name: nowhere, mountPath: /x}
  volumes:
  - {name: data, persistentVolumeClaim: {claimName: d}}
  - {name: raw, persistentVolumeClaim: {claimName: r}}
  - {name: host, hostPath: {path: /var/log}}
  - {name: tmp, emptyDir: {}}
`)
	for _, platform := range [][]string{nil, {"--tee", "snp"}} {
		status, stdout, stderr := cloister(t, append([]string{"plan", "--config", n.config, "-f", file}, platform...)...)
		assert.Equal(t, exitNo, status)
		for _, want := range []string{
			"hostNetwork", "hostPID", "hostIPC", "nvidia.com/gpu", "/dev/xvda", `"nowhere"`, "at /data",
			"/var/log at /first", "cannot propagate to the host",
			"refused:",
		} {
			assert.Contains(t, stdout, want)
		}
		assert.NotContains(t, stdout, "command line:")
		assert.NotContains(t, stdout, "/var/lib/kubelet")
		assert.Contains(t, stderr, "the pod would be refused for 9 reasons")
	}
	status, stdout, _ := cloister(t, "plan", "--config", n.config, "-f", file, "--json")
	assert.Equal(t, exitNo, status)
	var plan dryrun.PodPlan
	require.NoError(t, json.Unmarshal([]byte(stdout), &plan))
	assert.Len(t, plan.Refused, 9)
	assert.Nil(t, plan.Document)
	assert.False(t, plan.Started)
	assert.Contains(t, plan.Description, "NO PROTECTION")
}

func TestPlanWithoutQEMU(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "plan", "--config", n.config, "--tee", "snp")
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stdout, `"policy": 196608`, "the VM is known without a VMM")
	assert.Contains(t, stdout, "command line: none.")
	assert.Contains(t, stderr, "the VMM could not be started: hypervisor.path: ", "the reason stands where errors do")
	assert.Contains(t, stderr, n.path("qemu"))

	// Without a VMM the accelerator of an ordinary VM is not known.
	require.NoError(t, os.Remove(n.path("qemu")))
	status, stdout, stderr = cloister(t, "plan", "--config", n.config)
	assert.Equal(t, exitNo, status)
	assert.Empty(t, stdout)
	assert.Contains(t, stderr, n.path("qemu"))
}

// A real VMM's command line.
func TestPlanWithQEMU(t *testing.T) {
	config, qemu := tdxNode(t)
	status, stdout, stderr := cloister(t, "plan", "--config", config, "--json")
	require.Equal(t, exitOK, status, stderr)
	var plan dryrun.PodPlan
	require.NoError(t, json.Unmarshal([]byte(stdout), &plan))
	assert.Equal(t, qemu, plan.Binary)
	assert.Contains(t, plan.Argv, "-machine")
	require.NotEmpty(t, plan.Files)
	assert.Equal(t, 3, plan.Files[0].FD)
	_, stdout, _ = cloister(t, "plan", "--config", config)
	assert.Contains(t, stdout, "\ncommand line:\n"+qemu+" \\\n  -name")
}

func TestShellLines(t *testing.T) {
	assert.Equal(t, "/usr/bin/qemu \\\n  -append 'a b'\\''c' \\\n  -device x,y=1 \\\n  -object '{\"a\":1}' \\\n  -nodefaults ''",
		shellLines("/usr/bin/qemu", []string{"-append", "a b'c", "-device", "x,y=1", "-object", `{"a":1}`, "-nodefaults", ""}))
}
