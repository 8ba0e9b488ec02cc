// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBadManifests(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"empty":          {"", "holds no Pod"},
		"comments":       {"# x\n---\n# y\n", "holds no Pod"},
		"not YAML":       {"kind: [", "no manifest"},
		"a list":         {"- kind: Pod", "no manifest"},
		"a Deployment":   {"kind: Deployment", "holds a Deployment"},
		"two Pods":       {"kind: Pod\nspec: {containers: [{name: a}]}\n---\nkind: Pod\nspec: {containers: [{name: a}]}", "more than one Pod"},
		"no containers":  {"kind: Pod", "no containers"},
		"bad quantity":   {"kind: Pod\nspec: {containers: [{resources: {limits: {cpu: lots}}}]}", `"lots" is not a quantity`},
		"negative":       {"kind: Pod\nspec: {containers: [{resources: {limits: {cpu: -1}}}]}", "not a quantity"},
		"list of limits": {"kind: Pod\nspec: {containers: [{resources: {limits: [1]}}]}", "no manifest"},
		"text for list":  {"kind: Pod\nspec: {containers: main}", "no manifest"},
	} {
		_, err := Parse([]byte(tc.text))
		assert.ErrorContains(t, err, tc.want, name)
	}
	_, err := Parse([]byte(strings.Repeat("#", MaxSize+1)))
	assert.ErrorContains(t, err, "larger than")
	_, err = Read(strings.NewReader(strings.Repeat("#", 2*MaxSize)))
	assert.ErrorContains(t, err, "larger than")
	_, err = Read(iotest.ErrReader(io.ErrNoProgress))
	assert.ErrorIs(t, err, io.ErrNoProgress)
	many := "kind: Pod\nspec: {containers: [{volumeMounts: [" + strings.Repeat("{name: a},", maxThings+1) + "]}]}"
	_, err = Parse([]byte(many))
	assert.ErrorContains(t, err, "4097 mounts")
}

func TestVolumeKinds(t *testing.T) {
	for text, want := range map[string][3]string{
		"{name: a, hostPath: {path: /x}}": {"a", "hostPath", "/x"},
		"{name: a}":                       {"a", "emptyDir", ""},
		"{name: 1, csi: driver}":          {"", "csi", ""},
		"{name: a, emptyDir: null}":       {"a", "emptyDir", ""},
	} {
		p, err := Parse([]byte("kind: Pod\nspec: {containers: [{name: a}], volumes: [" + text + "]}"))
		require.NoError(t, err)
		v := p.Spec.Volumes[0]
		assert.Equal(t, want, [3]string{v.Name(), v.Kind(), v.Field("path")}, text)
	}
}

func TestQuantities(t *testing.T) {
	for text, want := range map[string]int64{
		"1": 1000, "1.5": 1500, ".5": 500, "500m": 500, "0.1m": 1, "2k": 2000000, "1Ki": 1024000,
		"1e3": 1000000, "1E2": 100000, "2e-3": 2, "5u": 1, "1n": 1, "0": 0,
		"1.": 1000, "9E": math.MaxInt64, "999999999999999999Ei": math.MaxInt64, "1M": 1000000000, "1Mi": 1048576000,
	} {
		q, err := parseQuantity(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, q.times(1000), text)
	}
	for _, bad := range []string{"", "m", "-1", "+1", "1 Gi", "1KI", "1ki", "0x10", "1/2", "1e999", "1e3k", "NaN", "1234567890123456789"} {
		_, err := parseQuantity(bad)
		assert.Error(t, err, bad)
	}
	assert.Zero(t, Quantity{}.times(1000))
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("# x\n---\nkind: Pod\nmetadata: {name: a, annotations: {b: c}}\nspec: {" +
		"containers: [{resources: {limits: {cpu: 1e-9, memory: 8Ei}}}], " +
		"initContainers: [{restartPolicy: Always, volumeMounts: [{name: v, mountPath: /v, subPath: s}]}], " +
		"volumes: [{name: v, configMap: {name: v}}]}"))
	f.Add([]byte("kind: Pod\nspec: {containers: [{}], resources: {limits: {cpu: 3}}}\n---\nkind: Pod"))
	f.Add([]byte("a: &a [*a]\nkind: Pod"))
	f.Add([]byte(`{"kind": "Pod", "spec": {"containers": [{"volumeDevices": [{"name": "d"}]}],
		"volumes": [{"name": 1}, {"hostPath": "x"}, {}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			return
		}
		if r := p.Spec.Limits(); r.Memory != nil && *r.Memory.Limit <= 0 || r.CPU != nil && *r.CPU.Quota <= 0 {
			t.Fatalf("a limit is not positive: %+v", r)
		}
		for _, v := range p.Spec.Volumes {
			v.Field(v.Kind() + v.Name())
		}
	})
}

// The kubelet's rule: what runs together adds up, what runs before needs no more than the largest.
func TestLimits(t *testing.T) {
	limits := func(spec string) (milli, bytes int64) {
		p, err := Parse([]byte("kind: Pod\nspec: " + spec))
		require.NoError(t, err)
		r := p.Spec.Limits()
		if r.CPU != nil {
			assert.Equal(t, uint64(cpuPeriod), *r.CPU.Period)
			milli = *r.CPU.Quota / (cpuPeriod / 1000)
		}
		if r.Memory != nil {
			bytes = *r.Memory.Limit
		}
		return milli, bytes
	}
	for _, tc := range []struct {
		name, spec   string
		milli, bytes int64
	}{
		{"none", "{containers: [{name: a}]}", 0, 0},
		{"sum", "{containers: [{resources: {limits: {cpu: 500m, memory: 1Ki}}}, {resources: {limits: {cpu: 1}}}, {name: c}]}", 1500, 1024},
		{"small init", "{initContainers: [{resources: {limits: {cpu: 1}}}], containers: [{resources: {limits: {cpu: 2}}}]}", 2000, 0},
		{"large init",
			"{initContainers: [{resources: {limits: {cpu: 3, memory: 10}}}], containers: [{resources: {limits: {cpu: 2}}}]}", 3000, 10},
		{"sidecar",
			"{initContainers: [{restartPolicy: Always, resources: {limits: {cpu: 1}}}, {resources: {limits: {cpu: 2}}}], " +
				"containers: [{resources: {limits: {cpu: 1500m}}}]}", 3000, 0},
		{"sidecar behind",
			"{initContainers: [{resources: {limits: {cpu: 2}}}, {restartPolicy: Always, resources: {limits: {cpu: 1}}}], " +
				"containers: [{resources: {limits: {cpu: 1500m}}}]}", 2500, 0},
		{"the pod's own", "{resources: {limits: {cpu: 4}}, containers: [{resources: {limits: {cpu: 1, memory: 5}}}]}", 4000, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			milli, bytes := limits(tc.spec)
			assert.Equal(t, tc.milli, milli)
			assert.Equal(t, tc.bytes, bytes)
		})
	}
}
