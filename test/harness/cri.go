// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI is a client of the node's CRI: the generated clients as they are, and shorthands for what tests do all the time.
type CRI struct {
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient

	conn *grpc.ClientConn
	node *Node
}

func dialCRI(n *Node) (*CRI, error) {
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &CRI{
		Runtime: runtimeapi.NewRuntimeServiceClient(conn),
		Images:  runtimeapi.NewImageServiceClient(conn),
		conn:    conn,
		node:    n,
	}, nil
}

// awaitImage waits until CRI knows an image: it learns of imports by events.
func (c *CRI) awaitImage(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		answer, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		if err == nil && answer.GetImage() != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("CRI does not know image %s: %w (last error: %v)", name, ctx.Err(), err)
		case <-ticker.C:
		}
	}
}

// PodSpec is what [CRI.RunPod] makes a pod from.
type PodSpec struct {
	// Name of the pod; random if empty.
	Name string
	// Handler is one of the node's; see the Handler constants.
	Handler     string
	Annotations map[string]string
	// Change, if set, gets the configuration before it is used, to set what is not above.
	Change func(*runtimeapi.PodSandboxConfig)
}

// Pod is a pod sandbox.
type Pod struct {
	ID     string
	Config *runtimeapi.PodSandboxConfig

	cri *CRI
}

// RunPod makes a pod sandbox, its cgroup below the node's.
func (c *CRI) RunPod(ctx context.Context, spec PodSpec) (*Pod, error) {
	name := spec.Name
	if name == "" {
		name = "pod-" + randomHex(4)
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: randomHex(8), Namespace: "default"},
		Hostname:     name,
		LogDirectory: filepath.Join(c.node.Dir, "logs", name),
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"10.88.0.1"}, Searches: []string{"cloister.test"}},
		Annotations:  maps.Clone(spec.Annotations),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: "/" + c.node.Name + "/" + name,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
	if spec.Change != nil {
		spec.Change(config)
	}
	if err := os.MkdirAll(config.GetLogDirectory(), 0o755); err != nil {
		return nil, err
	}
	answer, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: spec.Handler})
	if err != nil {
		return nil, fmt.Errorf("running pod %s with handler %s: %w", name, spec.Handler, err)
	}
	return &Pod{ID: answer.GetPodSandboxId(), Config: config, cri: c}, nil
}

// Status of the pod, with the runtime's own information.
func (p *Pod) Status(ctx context.Context) (*runtimeapi.PodSandboxStatus, map[string]string, error) {
	answer, err := p.cri.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	return answer.GetStatus(), answer.GetInfo(), err
}

// Stop stops the pod and all of its containers.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.cri.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Remove stops the pod, if need be, and removes it with all of its containers. The pod's own cgroup is removed too, as
// kubelet does it; if something is left in it, that fails silently here and is found as a leak.
func (p *Pod) Remove(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return fmt.Errorf("stopping pod %s: %w", p.ID, err)
	}
	if _, err := p.cri.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("removing pod %s: %w", p.ID, err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		groups, err := filepath.Glob(filepath.Join(pattern, p.Config.GetLinux().GetCgroupParent()))
		if err != nil {
			return err
		}
		for _, g := range groups {
			_ = unix.Rmdir(g)
		}
	}
	return nil
}
