// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
)

// qemuFeatures are those of a QEMU with all that is used here.
func qemuFeatures() qemu.Features {
	return qemu.Features{
		Version: "11.1.0", Architecture: hypervisor.ArchAMD64, Machine: "pc-q35-11.1", MachineOptions: []string{"usb", "vmport"},
		Types: []string{
			"kvm-accel", "tcg-accel", "memory-backend-memfd", "pcie-root-port", "scsi-hd", "vhost-user-vsock-pci", "vhost-vsock-pci", "virtio-net-pci",
			"virtio-scsi-pci", "sev-snp-guest", "tdx-guest",
		},
		Objects: map[string][]string{
			"sev-snp-guest": {"cbitpos", "reduced-phys-bits", "policy", "kernel-hashes", "host-data", "id-block", "id-auth", "author-key-enabled"},
			"tdx-guest":     {"attributes", "mrconfigid", "mrowner", "mrownerconfig", "quote-generation-socket"},
		},
		Sandbox: true,
	}
}

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
	p, err := parsePod([]byte(webPod))
	require.NoError(t, err)
	name, notes := platformOf("", p)
	assert.Equal(t, "snp", name)
	assert.Empty(t, notes)
	plan, err := planPod(context.Background(), n.load(t, name), p)
	require.NoError(t, err)
	assert.NotEmpty(t, plan.CommandError, "the node's QEMU does not run")
	assert.Equal(t, 2, plan.Document.CPU.Count)
	assert.Equal(t, uint64(200+256)<<20, plan.Document.Memory.Bytes)

	plan.CommandError = ""
	plan.Document.Confidential.SNP.CBitPosition, plan.Document.Confidential.SNP.ReducedPhysBits = 51, 1
	require.NoError(t, plan.commandFor("/usr/bin/qemu-system-x86_64", qemuFeatures()))
	var out bytes.Buffer
	require.NoError(t, plan.print(&out))
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
	for _, platform := range []string{"", "snp"} {
		status, stdout, stderr := cloister(t, "plan", "--config", n.config, "-f", file, "--tee", platform)
		assert.Equal(t, exitNo, status)
		for _, want := range []string{
			"hostNetwork", "hostPID", "hostIPC", "nvidia.com/gpu", "/dev/xvda", `"nowhere"`, "at /data", "/var/log at /first", "cannot propagate to the host",
			"a part of the emptyDir tmp", "refused:",
		} {
			assert.Contains(t, stdout, want)
		}
		assert.NotContains(t, stdout, "command line:")
		assert.NotContains(t, stdout, kubeletPod)
		assert.Contains(t, stderr, "the pod would be refused for 10 reasons")
	}
	status, stdout, _ := cloister(t, "plan", "--config", n.config, "-f", file, "--json")
	assert.Equal(t, exitNo, status)
	var plan podPlan
	require.NoError(t, json.Unmarshal([]byte(stdout), &plan))
	assert.Len(t, plan.Refused, 10)
	assert.Nil(t, plan.Document)
	assert.False(t, plan.Started)
	assert.Contains(t, plan.Description, "NO PROTECTION")
}

func TestPlanRefusesAnnotations(t *testing.T) {
	n := newNode(t, "[annotations]\nallowed = ['io.cloister.initdata', 'io.cloister.hypervisor.kernel-params', 'io.cloister.sizing.vcpus']")
	p := defaultPod()
	p.Metadata.Annotations = map[string]string{
		"io.cloister.sizing.vcpus": "many", "io.cloister.hypervisor.kernel-params": "debug", "io.cloister.unknown": "x",
	}
	plan, err := planPod(context.Background(), n.load(t, "snp"), p)
	require.NoError(t, err)
	assert.Len(t, plan.Refused, 2)
	assert.Contains(t, strings.Join(plan.Refused, "\n"), `"many" is not a whole number`)
	assert.Contains(t, strings.Join(plan.Refused, "\n"), "changes what is measured")
	assert.Equal(t, []string{"annotations without effect, since annotations.allowed does not list them: io.cloister.unknown"}, plan.Notes)
}

func TestPlanWithoutQEMU(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "plan", "--config", n.config, "--tee", "snp")
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stdout, `"policy": 196608`, "the VM is known without a VMM")
	assert.Contains(t, stdout, "command line: none.")
	assert.Contains(t, stderr, "the VMM could not be started")
}

func TestPlatformOfAPod(t *testing.T) {
	for _, tc := range []struct{ given, class, want, note string }{
		{"", "", "", ""}, {"", "cloister", "", ""}, {"snp", "cloister", "snp", ""}, {"", "cloister-tdx", "tdx", ""}, {"tdx", "cloister-tdx", "tdx", ""},
		{"snp", "cloister-tdx", "snp", "the plan is for --tee snp"}, {"", "cloister-classic", "", "names no platform"}, {"se", "runc", "se", "names no platform"},
	} {
		p := defaultPod()
		p.Spec.RuntimeClassName = tc.class
		name, notes := platformOf(tc.given, p)
		assert.Equal(t, tc.want, name, "%+v", tc)
		if tc.note == "" {
			assert.Empty(t, notes, "%+v", tc)
			continue
		}
		require.Len(t, notes, 1)
		assert.Contains(t, notes[0], tc.note)
	}
}

func TestVolumes(t *testing.T) {
	p, err := parsePod([]byte(strings.Replace(webPod, "emptyDir: {}", "csi: {driver: x}", 1)))
	require.NoError(t, err)
	become := func(name tee.Name) (all []string) {
		for _, v := range p.Spec.volumes(name) {
			all = append(all, v.Name+" "+v.Becomes)
		}
		return all
	}
	assert.Equal(t, []string{"conf shared", "tmp shared", "spare nothing"}, become(tee.None))
	assert.Equal(t, []string{"conf copied", "tmp refused", "spare nothing"}, become(tee.Sample))
}

func TestShellLines(t *testing.T) {
	assert.Equal(t, "/usr/bin/qemu \\\n  -append 'a b'\\''c' \\\n  -device x,y=1 \\\n  -object '{\"a\":1}' \\\n  -nodefaults ''",
		shellLines("/usr/bin/qemu", []string{"-append", "a b'c", "-device", "x,y=1", "-object", `{"a":1}`, "-nodefaults", ""}))
}
