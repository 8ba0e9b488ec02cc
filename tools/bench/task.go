// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	taskapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/fifo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

// criNamespace is where the CRI keeps its containers.
const criNamespace = "k8s.io"

// tasks is containerd's own task API, below the CRI: what ctr and nerdctl use.
type tasks struct {
	conn   *grpc.ClientConn
	client taskapi.TasksClient
	// dir holds FIFOs.
	dir string
	// execs counts, for ids.
	execs int
}

func dialTasks(socket, dir string) (*tasks, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &tasks{conn: conn, client: taskapi.NewTasksClient(conn), dir: dir}, nil
}

// stdio are the paths of FIFOs; empty ones are none.
type stdio struct{ in, out string }

// execution is a process that was added to a container and not started.
type execution struct {
	t             *tasks
	container, id string
}

// exec adds a process to a container of the CRI.
func (t *tasks) exec(ctx context.Context, container string, io stdio, args ...string) (*execution, error) {
	t.execs++
	e := &execution{t: t, container: container, id: fmt.Sprintf("bench-%d", t.execs)}
	spec, err := json.Marshal(specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"}})
	if err != nil {
		return nil, err
	}
	_, err = t.client.Exec(inCRI(ctx), &taskapi.ExecProcessRequest{
		ContainerID: container, ExecID: e.id, Stdin: io.in, Stdout: io.out,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec},
	})
	if err != nil {
		return nil, fmt.Errorf("exec of %q: %w", args, err)
	}
	return e, nil
}

func (e *execution) start(ctx context.Context) error {
	_, err := e.t.client.Start(inCRI(ctx), &taskapi.StartRequest{ContainerID: e.container, ExecID: e.id})
	return err
}

// end waits for the process, which must succeed, and removes it.
func (e *execution) end(ctx context.Context) error {
	answer, err := e.t.client.Wait(inCRI(ctx), &taskapi.WaitRequest{ContainerID: e.container, ExecID: e.id})
	if err != nil {
		return err
	}
	if _, err := e.t.client.DeleteProcess(inCRI(ctx), &taskapi.DeleteProcessRequest{ContainerID: e.container, ExecID: e.id}); err != nil {
		return err
	}
	if answer.GetExitStatus() != 0 {
		return fmt.Errorf("the process ended with status %d", answer.GetExitStatus())
	}
	return nil
}

// runTrue runs `true` without stdio and returns how long it took, all calls included.
func (t *tasks) runTrue(ctx context.Context, container string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	started := time.Now()
	e, err := t.exec(ctx, container, stdio{}, "true")
	if err != nil {
		return 0, err
	}
	if err := errors.Join(e.start(ctx), e.end(ctx)); err != nil {
		return 0, err
	}
	return time.Since(started), nil
}

// fromContainer has a process write so many bytes to its stdout and returns the rate in MiB/s.
func (t *tasks) fromContainer(ctx context.Context, container string, mib int) (_ float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	path, err := t.fifo("out")
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	out, err := fifo.OpenFifo(ctx, path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	e, err := t.exec(ctx, container, stdio{out: path}, "dd", "if=/dev/zero", "bs=65536", fmt.Sprintf("count=%d", mib*16))
	if err != nil {
		return 0, err
	}
	if err := e.start(ctx); err != nil {
		return 0, err
	}
	rate, err := receive(out, mib<<20)
	return rate, errors.Join(err, e.end(ctx))
}

// toContainer has a process read so many bytes from its stdin and returns the rate in MiB/s until it has ended.
func (t *tasks) toContainer(ctx context.Context, container string, mib int) (_ float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	path, err := t.fifo("in")
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	in, err := fifo.OpenFifo(ctx, path, unix.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	e, err := t.exec(ctx, container, stdio{in: path}, "dd", "of=/dev/null", "bs=65536")
	if err != nil {
		return 0, err
	}
	if err := e.start(ctx); err != nil {
		return 0, err
	}
	started := time.Now()
	if err := send(in, mib<<20); err != nil {
		return 0, err
	}
	if err := in.Close(); err != nil {
		return 0, err
	}
	if _, err := t.client.CloseIO(inCRI(ctx), &taskapi.CloseIORequest{ContainerID: container, ExecID: e.id, Stdin: true}); err != nil {
		return 0, err
	}
	err = e.end(ctx)
	return mibPerSecond(mib<<20, time.Since(started)), err
}

func (t *tasks) fifo(name string) (string, error) {
	path := filepath.Join(t.dir, fmt.Sprintf("%s-%d", name, t.execs))
	return path, unix.Mkfifo(path, 0o600)
}

func inCRI(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, criNamespace) }
