// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

func TestPlanRefusesAnnotations(t *testing.T) {
	config := newNode(t, "[annotations]\n"+
		"allowed = ['io.cloister.initdata', 'io.cloister.hypervisor.kernel-params', 'io.cloister.sizing.vcpus']")
	p := manifest.Example()
	p.Metadata.Annotations = map[string]string{
		"io.cloister.sizing.vcpus": "many", "io.cloister.hypervisor.kernel-params": "debug", "io.cloister.unknown": "x",
	}
	plan, err := Plan(t.Context(), load(t, config, "snp"), p)
	require.NoError(t, err)
	assert.Len(t, plan.Refused, 2)
	assert.Contains(t, strings.Join(plan.Refused, "\n"), `"many" is not a whole number`)
	assert.Contains(t, strings.Join(plan.Refused, "\n"), "changes what is measured")
	assert.Equal(t, []string{"annotations without effect, since annotations.allowed does not list them: io.cloister.unknown"}, plan.Notes)
	assert.Nil(t, plan.Document)
	assert.NoError(t, plan.Err)
}

// An annotation that the platform cannot have is the pod's fault: its plan says so.
func TestPlanRefusesInitdataForNobody(t *testing.T) {
	text, err := initdata.EncodeAnnotation([]byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n"))
	require.NoError(t, err)
	p := manifest.Example()
	p.Metadata.Annotations = map[string]string{"io.cloister.initdata": text}
	plan, err := Plan(t.Context(), load(t, newNode(t, "[annotations]\nallowed = ['io.cloister.initdata']"), "none"), p)
	require.NoError(t, err)
	require.Len(t, plan.Refused, 1)
	assert.Contains(t, plan.Refused[0], "initdata")
	assert.Nil(t, plan.Document)
}

// What the tool plans, the shim would start: a plan makes nothing, and is the same each time.
func TestPlanMakesNothing(t *testing.T) {
	config := newNode(t, "")
	before, err := filepath.Glob(filepath.Join(filepath.Dir(config), "*"))
	require.NoError(t, err)
	var texts []string
	for range 2 {
		plan, err := Plan(t.Context(), load(t, config, "snp"), manifest.Example())
		require.NoError(t, err)
		require.ErrorContains(t, plan.Err, "the VMM could not be started: ")
		require.ErrorContains(t, plan.Err, "out of order")
		assert.Equal(t, "snp (AMD SEV-SNP)", plan.Description)
		b, err := json.Marshal(plan)
		require.NoError(t, err)
		texts = append(texts, string(b))
	}
	assert.Equal(t, texts[0], texts[1])
	after, err := filepath.Glob(filepath.Join(filepath.Dir(config), "*"))
	require.NoError(t, err)
	assert.Equal(t, before, after)
}

// KVM is planned on a machine without it, as every hardware is: nobody is asked.
func TestPlanOfAVMMThatNeedsKVM(t *testing.T) {
	cfg := load(t, newNode(t, ""), "none")
	cfg.Hypervisor.Kind, cfg.Hypervisor.Path = configs.KindCloudHypervisor, filepath.Join(t.TempDir(), "cloud-hypervisor")
	require.NoError(t, os.WriteFile(cfg.Hypervisor.Path, []byte("#!/bin/sh\necho cloud-hypervisor v53.0.0\n"), 0o700))
	plan, err := Plan(t.Context(), cfg, manifest.Example())
	require.NoError(t, err)
	require.NoError(t, plan.Err)
	assert.Equal(t, hypervisor.AccelKVM, plan.Document.Accelerator)
	require.NotEmpty(t, plan.Requests)
	assert.Equal(t, "/api/v1/vm.create", plan.Requests[0].Path)

	cfg.Hypervisor.Accel = configs.AccelTCG // no hardware's matter
	_, err = Plan(t.Context(), cfg, manifest.Example())
	require.ErrorContains(t, err, "does not emulate")
}

// Nobody takes a VM that the host can read for a protected one.
func TestPlanOfADebugLaunch(t *testing.T) {
	cfg := load(t, newNode(t, "allow_debug = true"), "snp")
	cfg.TEE.SNP.Policy = 0xb0000
	plan, err := Plan(t.Context(), cfg, manifest.Example())
	require.NoError(t, err)
	assert.Contains(t, plan.Description, "NO PROTECTION")
}

type fakeDriver struct {
	hypervisor.Driver
	run hypervisor.Invocation
	can hypervisor.Capabilities
	err error
}

func (d fakeDriver) Capabilities(context.Context) (hypervisor.Capabilities, error) {
	return d.can, d.err
}

func (fakeDriver) Accelerator(context.Context, string) (hypervisor.Accelerator, error) {
	return hypervisor.AccelKVM, nil
}

func (d fakeDriver) Describe(context.Context, hypervisor.Document) (hypervisor.Invocation, error) {
	return d.run, d.err
}

func TestPlanOfACommand(t *testing.T) {
	run := hypervisor.Invocation{
		Binary: "/vmm", Args: []string{"--api"}, Files: []hypervisor.InheritedFile{{FD: 3, Name: "api", What: "its socket"}},
		Requests: []hypervisor.Request{{Method: "PUT", Path: "/vm.create", Body: json.RawMessage(`{"cpus":1}`)}},
	}
	p := &PodPlan{Document: &hypervisor.Document{}}
	p.command(t.Context(), fakeDriver{run: run})
	require.NoError(t, p.Err)
	b, err := json.Marshal(p)
	require.NoError(t, err)
	for _, want := range []string{
		`"binary":"/vmm"`, `"argv":["--api"]`, `"inherited_files":[{"fd":3,"name":"api","what":"its socket"}]`,
		`"requests":[{"method":"PUT","path":"/vm.create","body":{"cpus":1}}]`,
	} {
		assert.Contains(t, string(b), want)
	}
	assert.NotContains(t, string(b), "command_error")

	p = &PodPlan{Document: &hypervisor.Document{}}
	gone := errors.New("gone")
	p.command(t.Context(), fakeDriver{err: gone})
	require.ErrorIs(t, p.Err, gone)
	assert.Equal(t, "gone", p.CommandError)
	assert.Empty(t, p.Binary)
}

func TestPlatformOfAPod(t *testing.T) {
	for _, tc := range []struct{ given, class, want, note string }{
		{"", "", "", ""},
		{"", "cloister", "", ""},
		{"snp", "cloister", "snp", ""},
		{"", "cloister-tdx", "tdx", ""},
		{"tdx", "cloister-tdx", "tdx", ""},
		{"snp", "cloister-tdx", "snp", "the plan is for platform snp"},
		{"", "cloister-classic", "", "names no platform"},
		{"se", "runc", "se", "names no platform"},
	} {
		p := manifest.Example()
		p.Spec.RuntimeClassName = tc.class
		name, notes := PlatformOf(tc.given, p)
		assert.Equal(t, tc.want, name, "%+v", tc)
		if tc.note == "" {
			assert.Empty(t, notes, "%+v", tc)
			continue
		}
		require.Len(t, notes, 1)
		assert.Contains(t, notes[0], tc.note)
	}
}

const volumesPod = `
kind: Pod
spec:
  initContainers:
  - {name: init, volumeMounts: [{name: tmp, mountPath: /tmp}]}
  containers:
  - name: main
    volumeMounts:
    - {name: conf, mountPath: /conf}
    - {name: conf, mountPath: /one, subPath: one}
    - {name: tmp, mountPath: /tmp/part, subPath: part}
    - {name: bare, mountPath: /bare}
    - {name: data, mountPath: /data}
    - {name: host, mountPath: /host, mountPropagation: Bidirectional}
    - {name: gone, mountPath: /gone}
  volumes:
  - {name: conf, configMap: {name: x}}
  - {name: tmp, emptyDir: {}}
  - {name: bare}
  - {name: data, csi: {driver: x}}
  - {name: host, hostPath: {path: /srv}}
  - {name: spare, secret: {secretName: s}}
`

// What becomes of a volume is what is refused of it, too.
func TestVolumes(t *testing.T) {
	config := newNode(t, "")
	for platform, want := range map[string][]string{
		"none":   {"conf copied", "tmp in the guest", "bare in the guest", "data shared", "host refused", "spare nothing"},
		"sample": {"conf copied", "tmp in the guest", "bare in the guest", "data refused", "host refused", "spare nothing"},
	} {
		cfg := load(t, config, platform)
		p := parse(t, volumesPod)
		plan, err := Plan(t.Context(), cfg, p)
		require.NoError(t, err)
		var got []string
		for _, v := range plan.Volumes {
			got = append(got, v.Name+" "+string(v.Becomes))
			assert.NotContains(t, v.Detail, kubeletPod)
			if v.Becomes == Refused {
				found := false
				for _, r := range plan.Refused {
					found = found || strings.Contains(r, v.Detail)
				}
				assert.True(t, found, "%q is not among %q", v.Detail, plan.Refused)
			}
		}
		assert.Equal(t, want, got, platform)
		assert.Contains(t, plan.Refused, `container main: mount at /gone names the volume "gone", which the pod does not have`)
	}
}

func FuzzPod(f *testing.F) {
	f.Add([]byte(volumesPod))
	f.Add([]byte("kind: Pod\nspec: {containers: [{resources: {limits: {cpu: 1e-9, x: 1}}, volumeDevices: [{}]}], " +
		"volumes: [{hostPath: {path: ../..}}]}"))
	f.Add([]byte("kind: Pod\nspec: {containers: [{volumeMounts: [{name: ../x, subPath: ../../.., mountPath: y}]}], " +
		"volumes: [{name: ../x, a: 1, b: 2}]}"))
	cfg, err := configs.Defaults()
	if err != nil {
		f.Fatal(err)
	}
	sample, err := cfg.WithPlatform("sample")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := manifest.Parse(data)
		if err != nil {
			return
		}
		PlatformOf("", p)
		refusals(p.Spec)
		if got := volumesOf(sample, p.Spec); len(got) != len(p.Spec.Volumes) {
			t.Fatalf("%d of %d volumes", len(got), len(p.Spec.Volumes))
		}
		for _, m := range podConfig(cfg, p).Only.Mounts {
			if m.Type != "bind" {
				t.Fatalf("%+v", m)
			}
		}
	})
}

// A VMM that cannot be asked: for ordinary VMs the accelerator is not known, so that there is no plan.
func TestPlanWithoutAVMM(t *testing.T) {
	config := newNode(t, "")
	require.NoError(t, os.Remove(filepath.Join(filepath.Dir(config), "qemu")))
	_, err := Plan(t.Context(), load(t, config, "none"), manifest.Example())
	require.ErrorContains(t, err, filepath.Join(filepath.Dir(config), "qemu"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
