// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	"sigs.k8s.io/yaml"
)

// pod is what counts here of a Kubernetes Pod (k8s.io/api/core/v1).
type pod struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Name        string            `json:"name"`
		Namespace   string            `json:"namespace"`
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec podSpec `json:"spec"`
}

type podSpec struct {
	RuntimeClassName string      `json:"runtimeClassName"`
	HostNetwork      bool        `json:"hostNetwork"`
	HostPID          bool        `json:"hostPID"`
	HostIPC          bool        `json:"hostIPC"`
	Containers       []container `json:"containers"`
	InitContainers   []container `json:"initContainers"`
	Volumes          []volume    `json:"volumes"`
	// Resources of the pod as a whole, newer Kubernetes.
	Resources resources `json:"resources"`
}

type container struct {
	Name          string        `json:"name"`
	RestartPolicy string        `json:"restartPolicy"`
	Resources     resources     `json:"resources"`
	VolumeMounts  []volumeMount `json:"volumeMounts"`
	VolumeDevices []struct {
		Name       string `json:"name"`
		DevicePath string `json:"devicePath"`
	} `json:"volumeDevices"`
}

type resources struct {
	Limits map[string]quantity `json:"limits"`
}

type volumeMount struct {
	Name             string `json:"name"`
	MountPath        string `json:"mountPath"`
	SubPath          string `json:"subPath"`
	SubPathExpr      string `json:"subPathExpr"`
	MountPropagation string `json:"mountPropagation"`
	ReadOnly         bool   `json:"readOnly"`
}

// volume is its name and one more key, which says the kind.
type volume map[string]any

func (v volume) name() string {
	name, _ := v["name"].(string)
	return name
}

// kind is the key of the volume's source, "configMap" for example.
func (v volume) kind() string {
	kind := ""
	for key := range v {
		if key != "name" && key > kind {
			kind = key
		}
	}
	return kind
}

// field is a text in the volume's source.
func (v volume) field(name string) string {
	source, _ := v[v.kind()].(map[string]any)
	value, _ := source[name].(string)
	return value
}

// defaultPod stands for any pod without limits and volumes.
func defaultPod() *pod {
	p := &pod{Kind: "Pod"}
	p.Metadata.Name = "example"
	p.Spec.Containers = []container{{Name: "main"}}
	return p
}

// maxPodFile bounds a manifest; Kubernetes takes about as much.
const maxPodFile = 1 << 20

var documentEnd = regexp.MustCompile(`(?m)^---[ \t]*\r?$`)

// readPod reads a manifest with one Pod in it; "-" is in.
func readPod(path string, in io.Reader) (*pod, error) {
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxPodFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxPodFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxPodFile)
	}
	p, err := parsePod(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func parsePod(data []byte) (*pod, error) {
	var found *pod
	for _, doc := range documentEnd.Split(string(data), -1) {
		if len(bytes.TrimSpace([]byte(doc))) == 0 {
			continue
		}
		var p pod
		if err := yaml.Unmarshal([]byte(doc), &p); err != nil {
			return nil, fmt.Errorf("is no manifest of a Pod: %w", err)
		}
		switch {
		case p.Kind == "":
			continue // comments only
		case p.Kind != "Pod":
			return nil, fmt.Errorf("holds a %s; give the manifest of a Pod (kubectl get pod NAME -o yaml)", p.Kind)
		case found != nil:
			return nil, errors.New("holds more than one Pod; give one")
		case len(p.Spec.Containers) == 0:
			return nil, errors.New("the Pod has no containers")
		}
		found = &p
	}
	if found == nil {
		return nil, errors.New("holds no Pod")
	}
	return found, nil
}
