// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerSpec is what [Pod.Create] makes a container from.
type ContainerSpec struct {
	// Name of the container; random if empty.
	Name string
	// Image by name; [BusyboxImage] if empty.
	Image string
	// Command with its arguments; the image's if empty. Script is a shorthand for `sh -c Script`.
	Command []string
	Script  string
	Env     map[string]string
	Mounts  []*runtimeapi.Mount
	// Change, if set, gets the configuration before it is used, to set what is not above.
	Change func(*runtimeapi.ContainerConfig)
}

// Container is a container of a pod.
type Container struct {
	ID     string
	Config *runtimeapi.ContainerConfig
	// LogPath is the file that CRI writes the container's output to.
	LogPath string

	cri *CRI
}

// Create makes a container and does not start it.
func (p *Pod) Create(ctx context.Context, spec ContainerSpec) (*Container, error) {
	if spec.Name == "" {
		spec.Name = "c-" + randomHex(4)
	}
	if spec.Image == "" {
		spec.Image = BusyboxImage
	}
	if spec.Script != "" {
		spec.Command = []string{"/bin/sh", "-c", spec.Script}
	}
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: spec.Name},
		Image:    &runtimeapi.ImageSpec{Image: spec.Image},
		Command:  spec.Command,
		Mounts:   spec.Mounts,
		LogPath:  spec.Name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
	for key, value := range spec.Env {
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: key, Value: []byte(value)})
	}
	if spec.Change != nil {
		spec.Change(config)
	}
	answer, err := p.cri.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.ID, Config: config, SandboxConfig: p.Config,
	})
	if err != nil {
		return nil, fmt.Errorf("creating container %s: %w", spec.Name, err)
	}
	return &Container{
		ID: answer.GetContainerId(), Config: config, cri: p.cri,
		LogPath: filepath.Join(p.Config.GetLogDirectory(), config.GetLogPath()),
	}, nil
}

// Run makes a container and starts it.
func (p *Pod) Run(ctx context.Context, spec ContainerSpec) (*Container, error) {
	c, err := p.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	if err := c.Start(ctx); err != nil {
		return nil, errors.Join(err, c.Remove(context.WithoutCancel(ctx)))
	}
	return c, nil
}

// Start starts the container.
func (c *Container) Start(ctx context.Context) error {
	_, err := c.cri.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID})
	if err != nil {
		return fmt.Errorf("starting container %s: %w", c.Config.GetMetadata().GetName(), err)
	}
	return nil
}

// Stop sends SIGTERM (or what the image says), and SIGKILL after the grace period.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.cri.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID, Timeout: int64(grace.Seconds())})
	return err
}

// Remove removes the container, running or not.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.cri.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

// Status of the container.
func (c *Container) Status(ctx context.Context) (*runtimeapi.ContainerStatus, error) {
	answer, err := c.cri.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
	return answer.GetStatus(), err
}

// Stats of the container.
func (c *Container) Stats(ctx context.Context) (*runtimeapi.ContainerStats, error) {
	answer, err := c.cri.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.ID})
	return answer.GetStats(), err
}

// Wait waits until the container has exited, and returns its last status.
func (c *Container) Wait(ctx context.Context) (*runtimeapi.ContainerStatus, error) {
	var status *runtimeapi.ContainerStatus
	err := poll(ctx, func() (_ bool, err error) {
		status, err = c.Status(ctx)
		return status.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED, err
	})
	if err != nil {
		return status, fmt.Errorf("waiting for container %s (%s): %w", c.Config.GetMetadata().GetName(), status.GetState(), err)
	}
	return status, nil
}

// ExecResult is the outcome of [Container.Exec].
type ExecResult struct {
	Stdout, Stderr string
	ExitCode       int32
}

// Exec runs a command in the container and waits for it. A command that fails is no error; see ExitCode.
func (c *Container) Exec(ctx context.Context, command ...string) (ExecResult, error) {
	answer, err := c.cri.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: command})
	if err != nil {
		return ExecResult{}, fmt.Errorf("exec of %q in %s: %w", command, c.Config.GetMetadata().GetName(), err)
	}
	return ExecResult{string(answer.GetStdout()), string(answer.GetStderr()), answer.GetExitCode()}, nil
}

// Output runs a command in the container and returns what it prints, without the last newline. A status other than 0 is
// an error that quotes stderr.
func (c *Container) Output(ctx context.Context, command ...string) (string, error) {
	result, err := c.Exec(ctx, command...)
	if err != nil {
		return "", err
	}
	if result.ExitCode != 0 {
		return "", fmt.Errorf("exec of %q in %s: exit status %d: %s", command, c.Config.GetMetadata().GetName(), result.ExitCode,
			strings.TrimSpace(result.Stderr))
	}
	return strings.TrimSuffix(result.Stdout, "\n"), nil
}

// Log returns what the container has printed so far, per stream, out of CRI's log file.
func (c *Container) Log() (stdout, stderr string, err error) {
	data, err := os.ReadFile(c.LogPath)
	if err != nil {
		return "", "", err
	}
	return parseLog(string(data))
}

// WaitLog waits until the container has printed text to stdout.
func (c *Container) WaitLog(ctx context.Context, text string) error {
	var got string
	err := poll(ctx, func() (_ bool, err error) {
		got, _, err = c.Log()
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return strings.Contains(got, text), err
	})
	if err != nil {
		return fmt.Errorf("waiting for %q in the output of %s, which is %q: %w", text, c.Config.GetMetadata().GetName(), got, err)
	}
	return nil
}

// parseLog reads the CRI log format: "TIME stdout|stderr F|P TEXT" a line, P being a line to be continued.
func parseLog(data string) (stdout, stderr string, err error) {
	var out, errs strings.Builder
	for line := range strings.Lines(data) {
		line, whole := strings.CutSuffix(line, "\n")
		if !whole {
			break // being written
		}
		fields := strings.SplitN(line, " ", 4)
		if len(fields) != 4 {
			return "", "", fmt.Errorf("not a line of a CRI log: %q", line)
		}
		to := &out
		if fields[1] == "stderr" {
			to = &errs
		}
		to.WriteString(fields[3])
		if fields[2] == "F" {
			to.WriteByte('\n')
		}
	}
	return out.String(), errs.String(), nil
}

// poll asks until the answer is yes, an error, or ctx ends.
func poll(ctx context.Context, ask func() (bool, error)) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		if done, err := ask(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
