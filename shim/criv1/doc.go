// SPDX-License-Identifier: Apache-2.0

// Package criv1 reads what containerd hands to CreateSandbox: Kubernetes' runtime.v1.PodSandboxConfig, by messages of
// our own that have the same wire format. The messages of k8s.io/cri-api are not used because they link gRPC and every
// other CRI message into a process of which each pod has one.
//
// Trust: containerd wrote the bytes, but the pod's author chose most of the strings in them. Decode bounds the size;
// whoever uses a field checks it.
package criv1

//go:generate protoc --proto_path=../.. --go_out=../.. --go_opt=paths=source_relative shim/criv1/sandbox.proto
