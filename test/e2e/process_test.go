// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/test/harness"
)

// criNamespace is the containerd namespace of what CRI makes.
const criNamespace = "k8s.io"

// processType is how containerd's clients name a specs.Process.
const processType = "types.containerd.io/opencontainers/runtime-spec/1/Process"

// execCount makes exec ids that are unique.
var execCount atomic.Int64

// tasksOf is a client of the node's Tasks service. It reconnects by itself when containerd is restarted.
func tasksOf(t *testing.T, n *harness.Node) tasks.TasksClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return tasks.NewTasksClient(conn)
}

// process is an exec whose FIFOs are the test's own: nothing stands between them and the shim.
type process struct {
	t           *testing.T
	ctx         context.Context // with the containerd namespace
	tasks       tasks.TasksClient
	container   string
	id          string
	stdinPath   string
	stdin       *os.File
	out, errOut chan read
}

// read is what came out of a FIFO until its end.
type read struct {
	data []byte
	err  error
}

type processSpec struct {
	namespace string // criNamespace if empty
	script    string
	terminal  bool
	// beforeStart, if set, is called between the exec's creation and its start.
	beforeStart func(*process)
}

// newProcess starts a shell script in a running container. Its exec is deleted when the test ends.
func newProcess(t *testing.T, n *harness.Node, container string, spec processSpec) *process {
	t.Helper()
	if spec.namespace == "" {
		spec.namespace = criNamespace
	}
	dir := t.TempDir()
	p := &process{
		t: t, ctx: namespaces.WithNamespace(testContext(t), spec.namespace), tasks: tasksOf(t, n),
		container: container, id: "raw-" + itoa(execCount.Add(1)),
		stdinPath: filepath.Join(dir, "stdin"), out: make(chan read, 1), errOut: make(chan read, 1),
	}
	request := &tasks.ExecProcessRequest{
		ContainerID: container, ExecID: p.id, Terminal: spec.terminal,
		Stdin: p.stdinPath, Stdout: filepath.Join(dir, "stdout"),
	}
	if !spec.terminal {
		request.Stderr = filepath.Join(dir, "stderr")
	}
	for _, path := range []string{request.Stdin, request.Stdout, request.Stderr} {
		if path != "" {
			require.NoError(t, unix.Mkfifo(path, 0o600))
		}
	}
	value, err := json.Marshal(&specs.Process{
		Args: []string{"/bin/sh", "-c", spec.script}, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"}, NoNewPrivileges: true,
	})
	require.NoError(t, err)
	request.Spec = &anypb.Any{TypeUrl: processType, Value: value}
	_, err = p.tasks.Exec(p.ctx, request)
	require.NoError(t, err)
	cleanup(t, "deleting exec "+p.id, func(ctx context.Context) error {
		if p.stdin != nil {
			_ = p.stdin.Close()
		}
		ctx = namespaces.WithNamespace(ctx, spec.namespace)
		_, _ = p.tasks.Kill(ctx, &tasks.KillRequest{ContainerID: container, ExecID: p.id, Signal: uint32(unix.SIGKILL)})
		_, err := p.tasks.Wait(ctx, &tasks.WaitRequest{ContainerID: container, ExecID: p.id})
		if err == nil {
			_, err = p.tasks.DeleteProcess(ctx, &tasks.DeleteProcessRequest{ContainerID: container, ExecID: p.id})
		}
		if errdefs.IsNotFound(errgrpc.ToNative(err)) {
			return nil // it went with its container
		}
		return err
	})
	// The shim has them open now, so each read ends when the shim closes, and not before.
	drain(t, request.Stdout, p.out)
	if request.Stderr != "" {
		drain(t, request.Stderr, p.errOut)
	}
	if spec.beforeStart != nil {
		spec.beforeStart(p)
	}
	_, err = p.tasks.Start(p.ctx, &tasks.StartRequest{ContainerID: container, ExecID: p.id})
	require.NoError(t, err)
	p.attach()
	return p
}

// drain reads a FIFO to its end in a goroutine that ends with it: the shim closes it when the process is over.
func drain(t *testing.T, path string, into chan<- read) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	go func() {
		data, err := io.ReadAll(f)
		into <- read{data, err}
	}()
}

// attach opens the process's stdin.
func (p *process) attach() {
	p.t.Helper()
	f, err := os.OpenFile(p.stdinPath, os.O_WRONLY|unix.O_NONBLOCK, 0)
	require.NoError(p.t, err)
	p.stdin = f
}

// detach closes the process's stdin on this side, which is no end of input.
func (p *process) detach() {
	p.t.Helper()
	require.NoError(p.t, p.stdin.Close())
	p.stdin = nil
}

func (p *process) write(data []byte) {
	p.t.Helper()
	_, err := p.stdin.Write(data)
	require.NoError(p.t, err)
}

// closeStdin is the end of input.
func (p *process) closeStdin() {
	p.t.Helper()
	_, err := p.tasks.CloseIO(p.ctx, &tasks.CloseIORequest{ContainerID: p.container, ExecID: p.id, Stdin: true})
	require.NoError(p.t, err)
}

func (p *process) resize(width, height uint32) {
	p.t.Helper()
	_, err := p.tasks.ResizePty(p.ctx, &tasks.ResizePtyRequest{ContainerID: p.container, ExecID: p.id, Width: width, Height: height})
	require.NoError(p.t, err)
}

func (p *process) wait() uint32 {
	p.t.Helper()
	answer, err := p.tasks.Wait(p.ctx, &tasks.WaitRequest{ContainerID: p.container, ExecID: p.id})
	require.NoError(p.t, err)
	return answer.GetExitStatus()
}

// finished waits for the process and for the end of its output.
func (p *process) finished() (stdout, stderr []byte, status uint32) {
	p.t.Helper()
	status = p.wait()
	stdout = p.all("stdout", p.out)
	if len(p.errOut) > 0 || p.hasStderr() {
		stderr = p.all("stderr", p.errOut)
	}
	return stdout, stderr, status
}

func (p *process) hasStderr() bool {
	_, err := os.Stat(filepath.Join(filepath.Dir(p.stdinPath), "stderr"))
	return err == nil
}

func (p *process) all(name string, from <-chan read) []byte {
	p.t.Helper()
	select {
	case r := <-from:
		require.NoError(p.t, r.err, name)
		return r.data
	case <-p.ctx.Done():
		require.FailNow(p.t, "the end of "+name+" never came")
		return nil
	}
}
