// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// annotationsFile stands for a file in the faults of annotations.
const annotationsFile = "pod annotations"

// AnnotationPrefix starts every annotation that is addressed to Cloister.
const AnnotationPrefix = "io.cloister."

// annotation is what one annotation does: value becomes what TOML would have given for key.
type annotation struct {
	key   string
	value func(c *Config, s string) (any, *problem)
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
		AnnotationPrefix + "sizing.vcpus":                  {"sizing.default_vcpus", whole},
		AnnotationPrefix + "sizing.memory-mib":             {"sizing.default_memory_mib", whole},
		AnnotationPrefix + "rootfs.writable-layer-max-mib": {"rootfs.writable_layer_max_mib", whole},
		AnnotationPrefix + "timeouts.boot":                 {"timeouts.boot", asText},
		AnnotationPrefix + "timeouts.create-container":     {"timeouts.create_container", asText},
		AnnotationPrefix + "hypervisor.kernel-params": {"hypervisor.kernel_params", func(c *Config, s string) (any, *problem) {
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

// AnnotationKeys lists all annotations that annotations.allowed can name, sorted.
func AnnotationKeys() []string {
	return slices.Sorted(maps.Keys(annotationTable()))
}

// ApplyAnnotations gives a copy of c that the pod's annotations changed. Only keys that annotations.allowed lists have
// an effect; all others, known or not, have none: IgnoredAnnotations tells them for the log. A bad value of a listed
// key is a fault; the error is of type Faults and has all of them.
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
		if len(pod[name]) > maxStringBytes {
			faults = append(faults, Fault{File: annotationsFile, Key: name, Reason: fmt.Sprintf("is %d bytes long", len(pod[name])), Fix: fmt.Sprintf("give at most %d", maxStringBytes)})
			continue
		}
		raw, p := a.value(c, pod[name])
		if p == nil {
			p = byKey[a.key].set(n, raw)
		}
		if p != nil {
			faults = append(faults, Fault{File: annotationsFile, Key: name, Reason: p.reason, Fix: p.fix})
			continue
		}
		n.origins[a.key] = origin{file: annotationsFile}
	}
	faults = append(faults, crossCheck(n)...)
	if err := faults.err(); err != nil {
		return nil, err
	}
	return n, nil
}

// IgnoredAnnotations lists, sorted, the pod's annotations that are addressed to Cloister but have no effect, because
// annotations.allowed does not list them or because there is no such key.
func (c *Config) IgnoredAnnotations(pod map[string]string) []string {
	table := annotationTable()
	var ignored []string
	for _, name := range slices.Sorted(maps.Keys(pod)) {
		if !strings.HasPrefix(name, AnnotationPrefix) {
			continue
		}
		if _, known := table[name]; !known || !slices.Contains(c.Annotations.Allowed, name) {
			ignored = append(ignored, name)
		}
	}
	return ignored
}
