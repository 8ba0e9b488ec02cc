// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cloister-project/cloister/tee/abi"
)

// annotationsFile stands for a file in the faults of annotations.
const annotationsFile = "pod annotations"

// AnnotationPrefix starts every annotation that is addressed to Cloister.
const AnnotationPrefix = "io.cloister."

// Annotations with a pod's own initdata: Cloister's key, and the one that pods written for Kata Containers have. Both mean
// the same.
const (
	AnnotationInitdata     = AnnotationPrefix + "initdata"
	AnnotationKataInitdata = "io.katacontainers.config.hypervisor.cc_init_data"
)

// maxInitdataBytes bounds an annotation with initdata: Kubernetes takes 256 KiB of annotations in all. What it unpacks to
// has a limit of its own where it is unpacked.
const maxInitdataBytes = 256 << 10

// annotation is what one annotation does: value becomes what TOML would have given for key.
type annotation struct {
	key   string
	value func(c *Config, s string) (any, *problem)
	// set is in value's place for what is no key of the files.
	set func(c *Config, s string) *problem
	// max is the longest value in bytes; 0: maxStringBytes.
	max int
	// fixed: a confidential VM's is the same for all pods of a configuration, so that its measurement is known before.
	fixed bool
}

// annotationTable is the fixed list of what annotations can change. Never add a key that names a file or a command
// (design rule 2).
func annotationTable() map[string]annotation {
	whole := func(_ *Config, s string) (any, *problem) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, &problem{fmt.Sprintf("%q is not a whole number", clip(s)), "give digits only"}
		}
		return n, nil
	}
	asText := func(_ *Config, s string) (any, *problem) { return s, nil }
	return map[string]annotation{
		AnnotationPrefix + "sizing.vcpus":                  {key: "sizing.default_vcpus", value: whole},
		AnnotationPrefix + "sizing.memory-mib":             {key: "sizing.default_memory_mib", value: whole},
		AnnotationPrefix + "rootfs.writable-layer-max-mib": {key: "rootfs.writable_layer_max_mib", value: whole},
		AnnotationPrefix + "scratch.size-mib":              {key: "scratch.size_mib", value: whole},
		AnnotationPrefix + "timeouts.boot":                 {key: "timeouts.boot", value: asText},
		AnnotationPrefix + "timeouts.create-container":     {key: "timeouts.create_container", value: asText},
		AnnotationInitdata:                                 {set: initdataAnnotation, max: maxInitdataBytes},
		AnnotationKataInitdata:                             {set: initdataAnnotation, max: maxInitdataBytes},
		AnnotationPrefix + "hypervisor.kernel-params": {key: "hypervisor.kernel_params", fixed: true,
			value: func(c *Config, s string) (any, *problem) {
				var all []any
				for _, p := range c.Hypervisor.KernelParams {
					all = append(all, p)
				}
				for _, p := range strings.Fields(s) {
					all = append(all, p)
				}
				return all, nil
			}},
	}
}

func initdataAnnotation(c *Config, s string) *problem {
	switch {
	case s == "":
		return &problem{"is empty", "give base64 of the gzip of an initdata document, or remove it"}
	case c.TEE.InitdataAnnotation != "" && c.TEE.InitdataAnnotation != s:
		return &problem{"differs from what " + AnnotationInitdata + " says", "give one of the two"}
	case !c.TEE.confidential():
		return &problem{fmt.Sprintf("is given with tee.platform = %q: nothing binds it to the launch of an ordinary VM", abi.None),
			"choose a RuntimeClass with a confidential platform, or remove it"}
	}
	c.TEE.InitdataAnnotation = s
	return nil
}

// AnnotationKeys lists all annotations that annotations.allowed can name, sorted.
func AnnotationKeys() []string {
	return slices.Sorted(maps.Keys(annotationTable()))
}

// ApplyAnnotations returns a copy of c that the pod's annotations changed. Only keys that annotations.allowed lists have
// an effect; all others, known or not, have none: IgnoredAnnotations tells them for the log. A bad value of a listed
// key is a fault, and so is initdata of a confidential pod that is not listed; the error is of type Faults and has all of them.
func (c *Config) ApplyAnnotations(pod map[string]string) (*Config, error) {
	n := c.clone()
	byKey := map[string]setting{}
	for _, s := range settings() {
		byKey[s.key] = s
	}
	var faults Faults
	table := annotationTable()
	for _, name := range slices.Sorted(maps.Keys(pod)) {
		a, known := table[name]
		if !known || !slices.Contains(c.Annotations.Allowed, name) {
			continue
		}
		if p := a.apply(c, n, byKey, pod[name]); p != nil {
			faults = append(faults, Fault{File: annotationsFile, Key: name, Reason: p.reason, Fix: p.fix})
			continue
		}
		if a.key != "" {
			n.origins[a.key] = origin{file: annotationsFile}
		}
	}
	faults = append(faults, n.missedInitdata(pod)...)
	faults = append(faults, crossCheck(n)...)
	if err := faults.err(); err != nil {
		return nil, err
	}
	return n, nil
}

// missedInitdata tells of a confidential pod's initdata that the node does not allow: the pod is not to run without it, or
// with another.
func (c *Config) missedInitdata(pod map[string]string) Faults {
	var faults Faults
	for _, name := range []string{AnnotationInitdata, AnnotationKataInitdata} {
		value, given := pod[name]
		if !given || !c.TEE.confidential() || slices.Contains(c.Annotations.Allowed, name) || value == c.TEE.InitdataAnnotation {
			continue
		}
		faults = append(faults, Fault{File: annotationsFile, Key: name,
			Reason: "is not allowed on this node, and the pod is not to run without it",
			Fix:    "add the key to annotations.allowed in the node's configuration, or remove the annotation"})
	}
	return faults
}

// apply lays the value over n, a copy of the configuration c.
func (a annotation) apply(c, n *Config, byKey map[string]setting, value string) *problem {
	if limit := cmp.Or(a.max, maxStringBytes); len(value) > limit {
		return &problem{fmt.Sprintf("is %d bytes long", len(value)), fmt.Sprintf("give at most %d", limit)}
	}
	if a.fixed && c.TEE.confidential() {
		return &problem{fmt.Sprintf("changes what is measured, with tee.platform = %q", c.TEE.Platform),
			"remove it: a confidential VM's kernel command line is the configuration's alone, so that its measurement is known before"}
	}
	if a.set != nil {
		return a.set(n, value)
	}
	raw, p := a.value(c, value)
	if p != nil {
		return p
	}
	return byKey[a.key].set(n, raw)
}

// IgnoredAnnotations lists, sorted, the pod's annotations that are addressed to Cloister but have no effect, because
// annotations.allowed does not list them or because there is no such key.
func (c *Config) IgnoredAnnotations(pod map[string]string) []string {
	table := annotationTable()
	var ignored []string
	for _, name := range slices.Sorted(maps.Keys(pod)) {
		if !strings.HasPrefix(name, AnnotationPrefix) && name != AnnotationKataInitdata {
			continue
		}
		if _, known := table[name]; !known || !slices.Contains(c.Annotations.Allowed, name) {
			ignored = append(ignored, name)
		}
	}
	return ignored
}
