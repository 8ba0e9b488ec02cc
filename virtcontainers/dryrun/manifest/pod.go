// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Pod is what counts here of a Kubernetes Pod (k8s.io/api/core/v1).
type Pod struct {
	Kind     string   `json:"kind"`
	Metadata Metadata `json:"metadata"`
	Spec     Spec     `json:"spec"`
}

// Metadata of a Pod.
type Metadata struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	Annotations map[string]string `json:"annotations"`
}

// Spec of a Pod.
type Spec struct {
	RuntimeClassName string      `json:"runtimeClassName"`
	HostNetwork      bool        `json:"hostNetwork"`
	HostPID          bool        `json:"hostPID"`
	HostIPC          bool        `json:"hostIPC"`
	Containers       []Container `json:"containers"`
	InitContainers   []Container `json:"initContainers"`
	Volumes          []Volume    `json:"volumes"`
	// Resources of the pod as a whole, newer Kubernetes.
	Resources Resources `json:"resources"`
}

// Container of a Pod.
type Container struct {
	Name          string         `json:"name"`
	RestartPolicy string         `json:"restartPolicy"`
	Resources     Resources      `json:"resources"`
	VolumeMounts  []VolumeMount  `json:"volumeMounts"`
	VolumeDevices []VolumeDevice `json:"volumeDevices"`
}

// Resources of a container or a Pod.
type Resources struct {
	Limits map[string]Quantity `json:"limits"`
}

// VolumeMount is a volume in a container.
type VolumeMount struct {
	Name             string `json:"name"`
	MountPath        string `json:"mountPath"`
	SubPath          string `json:"subPath"`
	SubPathExpr      string `json:"subPathExpr"`
	MountPropagation string `json:"mountPropagation"`
	ReadOnly         bool   `json:"readOnly"`
}

// VolumeDevice is a volume that a container gets as a block device.
type VolumeDevice struct {
	Name       string `json:"name"`
	DevicePath string `json:"devicePath"`
}

// Volume is its name and one more key, which says the kind.
type Volume map[string]any

// Name of the volume.
func (v Volume) Name() string {
	name, _ := v["name"].(string)
	return name
}

// Kind is the key of the volume's source, "configMap" for example; Kubernetes makes one without a source an emptyDir.
func (v Volume) Kind() string {
	kind := ""
	for key := range v {
		if key != "name" && key > kind {
			kind = key
		}
	}
	if kind == "" {
		return "emptyDir"
	}
	return kind
}

// Field is a text in the volume's source.
func (v Volume) Field(name string) string {
	source, _ := v[v.Kind()].(map[string]any)
	value, _ := source[name].(string)
	return value
}

// Example stands for any Pod without limits and volumes.
func Example() *Pod {
	return &Pod{Kind: "Pod", Metadata: Metadata{Name: "example"}, Spec: Spec{Containers: []Container{{Name: "main"}}}}
}

// All are the init containers and the containers.
func (s Spec) All() []Container { return slices.Concat(s.InitContainers, s.Containers) }

// Limits of a manifest. Kubernetes takes about as many bytes.
const (
	MaxSize = 1 << 20
	// maxThings bounds containers, volumes, mounts and devices, each.
	maxThings = 4096
)

// documentEnd stands between the documents of a YAML stream.
var documentEnd = regexp.MustCompile(`(?m)^---[ \t]*\r?$`)

// Read reads a manifest with one Pod in it. The errors do not name the file.
func Read(in io.Reader) (*Pod, error) {
	data, err := io.ReadAll(io.LimitReader(in, MaxSize+1))
	if err != nil {
		return nil, err
	}
	return Parse(data)
}

// Parse reads a manifest with one Pod in it.
func Parse(data []byte) (*Pod, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("is larger than %d bytes", MaxSize)
	}
	var found *Pod
	for _, doc := range documentEnd.Split(string(data), -1) {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var p Pod
		if err := yaml.Unmarshal([]byte(doc), &p); err != nil {
			return nil, fmt.Errorf("is no manifest of a Pod: %w", err)
		}
		switch {
		case p.Kind == "":
			continue // comments only
		case p.Kind != "Pod":
			return nil, fmt.Errorf("holds a %.64s; give the manifest of a Pod (kubectl get pod NAME -o yaml)", p.Kind)
		case found != nil:
			return nil, errors.New("holds more than one Pod; give one")
		}
		found = &p
	}
	if found == nil {
		return nil, errors.New("holds no Pod")
	}
	if err := found.check(); err != nil {
		return nil, err
	}
	return found, nil
}

func (p *Pod) check() error {
	if len(p.Spec.Containers) == 0 {
		return errors.New("the Pod has no containers")
	}
	mounts, devices := 0, 0
	for _, c := range p.Spec.All() {
		mounts, devices = mounts+len(c.VolumeMounts), devices+len(c.VolumeDevices)
	}
	for _, t := range []struct {
		what string
		n    int
	}{{"containers", len(p.Spec.All())}, {"volumes", len(p.Spec.Volumes)}, {"mounts", mounts}, {"devices", devices}} {
		if t.n > maxThings {
			return fmt.Errorf("the Pod has %d %s; more than %d are not looked at", t.n, t.what, maxThings)
		}
	}
	return nil
}
