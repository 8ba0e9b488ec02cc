// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/internal/podtest"
	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder keeps events in short: "start c1", "exit c1/x 42".
type recorder struct {
	mu  sync.Mutex
	got []string
}

func (r *recorder) Publish(event any) {
	var s string
	switch e := event.(type) {
	case *eventstypes.TaskCreate:
		s = "create " + e.ContainerID
	case *eventstypes.TaskStart:
		s = "start " + e.ContainerID
	case *eventstypes.TaskOOM:
		s = "oom " + e.ContainerID
	case *eventstypes.TaskExit:
		s = fmt.Sprintf("exit %s/%s %d", e.ContainerID, e.ID, e.ExitStatus)
	case *eventstypes.TaskDelete:
		s = fmt.Sprintf("delete %s %d", e.ContainerID, e.ExitStatus)
	case *eventstypes.TaskExecAdded:
		s = "exec-added " + e.ContainerID + "/" + e.ExecID
	case *eventstypes.TaskExecStarted:
		s = "exec-started " + e.ContainerID + "/" + e.ExecID
	case *eventstypes.TaskPaused:
		s = "paused " + e.ContainerID
	case *eventstypes.TaskResumed:
		s = "resumed " + e.ContainerID
	default:
		s = fmt.Sprintf("%T", event)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, s)
}

func (r *recorder) events() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.got...)
}

type fixture struct {
	*Service
	t         *testing.T
	pods      *podtest.Factory
	events    *recorder
	holder    *pods.Holder
	mu        sync.Mutex
	shutdowns int
	dir       string
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{t: t, pods: &podtest.Factory{}, events: &recorder{}, holder: &pods.Holder{}, dir: t.TempDir()}
	f.Service = New(t.Context(), Config{
		Namespace: "k8s.io", Holder: f.holder, NewPod: f.pods.New, Events: f.events,
		Options: func() (*anypb.Any, error) { return nil, nil },
		Shutdown: func(context.Context) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.shutdowns++
		},
	})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(t, f.Close(ctx))
	})
	return f
}

func (f *fixture) ended() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shutdowns
}

// bundle makes a bundle with a specification.
func (f *fixture) bundle(id string, annotations map[string]string) string {
	dir := filepath.Join(f.dir, id)
	require.NoError(f.t, os.MkdirAll(dir, 0o700))
	data, err := json.Marshal(&specs.Spec{
		Process: &specs.Process{Args: []string{"true"}}, Annotations: annotations,
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}}},
	})
	require.NoError(f.t, err)
	require.NoError(f.t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600))
	return dir
}

func pause(id string) map[string]string {
	return map[string]string{pods.AnnotationContainerType: pods.ContainerTypeSandbox, pods.AnnotationSandboxID: id}
}

func member(sandbox string) map[string]string {
	return map[string]string{pods.AnnotationContainerType: pods.ContainerTypeContainer, pods.AnnotationSandboxID: sandbox}
}

func (f *fixture) create(id string, annotations map[string]string) {
	f.t.Helper()
	resp, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(id, annotations)})
	require.NoError(f.t, err)
	require.Equal(f.t, uint32(podtest.PID), resp.GetPid())
}

func (f *fixture) start(id, execID string) {
	f.t.Helper()
	resp, err := f.Start(f.t.Context(), &taskapi.StartRequest{ID: id, ExecID: execID})
	require.NoError(f.t, err)
	require.Equal(f.t, uint32(podtest.PID), resp.GetPid())
}

func (f *fixture) exec(id, execID string) {
	f.t.Helper()
	spec, err := json.Marshal(&specs.Process{Args: []string{"ls"}, Terminal: true})
	require.NoError(f.t, err)
	_, err = f.Exec(f.t.Context(), &taskapi.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{Value: spec}})
	require.NoError(f.t, err)
}

func (f *fixture) wait(id, execID string) uint32 {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 10*time.Second)
	defer cancel()
	resp, err := f.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
	require.NoError(f.t, err)
	return resp.GetExitStatus()
}

func (f *fixture) remove(id, execID string) *taskapi.DeleteResponse {
	f.t.Helper()
	resp, err := f.Delete(f.t.Context(), &taskapi.DeleteRequest{ID: id, ExecID: execID})
	require.NoError(f.t, err)
	return resp
}

func (f *fixture) status(id, execID string) tasktypes.Status {
	f.t.Helper()
	resp, err := f.State(f.t.Context(), &taskapi.StateRequest{ID: id, ExecID: execID})
	require.NoError(f.t, err)
	return resp.GetStatus()
}

func (f *fixture) shutdown() {
	f.t.Helper()
	_, err := f.Shutdown(f.t.Context(), &taskapi.ShutdownRequest{})
	require.NoError(f.t, err)
}

func TestSingleContainer(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	require.Equal(t, pods.ModeSingle, f.holder.Mode())
	require.Equal(t, vc.NetworkNew, f.pods.Last().Config.Network)
	require.True(t, f.pods.Last().Container("c").Config.HooksDone)
	require.Equal(t, tasktypes.Status_CREATED, f.status("c", ""))
	f.shutdown()
	require.Zero(t, f.ended(), "there is a task")

	f.start("c", "")
	require.Equal(t, tasktypes.Status_RUNNING, f.status("c", ""))
	_, err := f.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)

	f.pods.Last().Container("c").InitProcess().Exit(42)
	require.Equal(t, uint32(42), f.wait("c", ""))
	require.Equal(t, tasktypes.Status_STOPPED, f.status("c", ""))
	_, err = f.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 15})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "process already finished")
	stats, err := f.Stats(t.Context(), &taskapi.StatsRequest{ID: "c"})
	require.NoError(t, err, "CRI looks for OOM kills between exit and deletion")
	require.Equal(t, "io.containerd.cgroups.v2.Metrics", stats.GetStats().GetTypeUrl())
	require.True(t, f.pods.Last().Ready())

	kept, err := bundle.ReadExit(filepath.Join(f.dir, "c"))
	require.NoError(t, err)
	require.Equal(t, uint32(42), kept.Status)

	resp := f.remove("c", "")
	require.Equal(t, uint32(42), resp.GetExitStatus())
	require.False(t, f.pods.Last().Ready(), "the pod ends with its container")
	require.Equal(t, resp, f.remove("c", ""), "a repeat gives the same")
	require.Equal(t, uint32(42), f.wait("c", ""))
	_, err = f.State(t.Context(), &taskapi.StateRequest{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	f.shutdown()
	require.Equal(t, 1, f.ended())
	require.Equal(t, []string{"create c", "start c", "exit c/c 42", "delete c 42"}, f.events.events())
}

func TestPauseContainer(t *testing.T) {
	f := newFixture(t)
	f.create("p", pause("p"))
	f.start("p", "")
	f.create("a", member("p"))
	f.create("b", member("p"))
	f.start("a", "")
	f.start("b", "")

	_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "p2", Bundle: f.bundle("p2", pause("p2"))})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "x", Bundle: f.bundle("x", member("other"))})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = f.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "p", ExecID: "x", Spec: &anypb.Any{Value: []byte("{}")}})
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	stats, err := f.Stats(t.Context(), &taskapi.StatsRequest{ID: "p"})
	require.NoError(t, err)
	require.NotNil(t, stats.GetStats())

	// A container is made anew in the living pod.
	f.pods.Last().Container("a").InitProcess().Exit(0)
	require.Zero(t, f.wait("a", ""))
	f.remove("a", "")
	f.shutdown()
	f.create("a", member("p"))
	f.start("a", "")
	require.Equal(t, tasktypes.Status_RUNNING, f.status("a", ""))

	_, err = f.Kill(t.Context(), &taskapi.KillRequest{ID: "p", Signal: 1})
	require.NoError(t, err)
	require.True(t, f.pods.Last().Ready(), "a pause program ignores SIGHUP")
	_, err = f.Kill(t.Context(), &taskapi.KillRequest{ID: "p", Signal: 9})
	require.NoError(t, err)
	require.Equal(t, uint32(137), f.wait("p", ""))
	require.Equal(t, uint32(137), f.wait("a", ""))

	events := f.events.events()
	require.Equal(t, "exit p/p 137", events[len(events)-1], "the pause container's exit is the last")
	require.ElementsMatch(t, []string{"exit a/a 137", "exit b/b 137"}, events[len(events)-3:len(events)-1])

	// The pause container may go first; what is left can still be deleted.
	require.NoError(t, bundle.WriteShim(filepath.Join(f.dir, "p"), os.Getpid()))
	f.remove("p", "")
	require.NoError(t, bundle.EndShim(t.Context(), filepath.Join(f.dir, "p"), 0))
	f.shutdown()
	require.Zero(t, f.ended())
	f.remove("a", "")
	f.remove("b", "")
	f.shutdown()
	require.Equal(t, 1, f.ended())
}

func TestPauseContainerOfADyingPod(t *testing.T) {
	f := newFixture(t)
	f.create("p", pause("p"))
	f.start("p", "")
	f.create("a", member("p"))
	f.start("a", "")
	f.pods.Last().Lose(errors.New("QEMU was killed"))
	require.Equal(t, uint32(137), f.wait("p", ""))
	require.Equal(t, uint32(137), f.wait("a", ""))
	_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "b", Bundle: f.bundle("b", member("p"))})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	f.remove("a", "")
	f.remove("p", "")
	require.Equal(t, pods.ModeNone, f.holder.Mode())
}

func TestPauseKilledBySIGTERMEndsWell(t *testing.T) {
	f := newFixture(t)
	f.create("p", pause("p"))
	f.start("p", "")
	_, err := f.Kill(t.Context(), &taskapi.KillRequest{ID: "p", Signal: 15})
	require.NoError(t, err)
	require.Zero(t, f.wait("p", ""))
	f.remove("p", "")
}

func TestContainerOfSandboxAPI(t *testing.T) {
	f := newFixture(t)
	require.NoError(t, f.holder.Claim(pods.ModeSandbox, "s"))
	_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c", Bundle: f.bundle("c", member("s"))})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "the sandbox is still being made")

	pod, err := f.pods.New(t.Context(), vc.PodConfig{ID: "s"})
	require.NoError(t, err)
	require.NoError(t, pod.Start(t.Context()))
	f.holder.Set(pod)
	connect, err := f.Connect(t.Context(), &taskapi.ConnectRequest{ID: "s"})
	require.NoError(t, err)
	require.Equal(t, uint32(podtest.PID), connect.GetTaskPid())
	require.Equal(t, uint32(os.Getpid()), connect.GetShimPid())
	pids, err := f.Pids(t.Context(), &taskapi.PidsRequest{ID: "s"})
	require.NoError(t, err)
	require.Len(t, pids.GetProcesses(), 1)

	f.create("c", member("s"))
	f.create("d", nil) // without annotations, but there is a sandbox
	require.Equal(t, f.pods.Last(), pod)
	require.False(t, f.pods.Last().Container("d").Config.HooksDone)
	for _, id := range []string{"c", "d"} {
		f.start(id, "")
		f.pods.Last().Container(id).InitProcess().Exit(0)
		f.wait(id, "")
		f.remove(id, "")
	}
	f.shutdown()
	require.Zero(t, f.ended(), "only ShutdownSandbox ends the shim")
	require.True(t, f.pods.Last().Ready())
	require.NoError(t, pod.Stop(t.Context()))
}

func TestExitOfAProcessThatEndsAtOnce(t *testing.T) {
	f := newFixture(t)
	for i := range 50 {
		id := fmt.Sprintf("c%d", i)
		f.create(id, nil)
		p := f.pods.Last().Container(id).InitProcess()
		p.OnStart = func(context.Context) error {
			// It has been killed by the OOM killer before Start even returns.
			f.OnOOM(id)
			p.Exit(137)
			return nil
		}
		f.start(id, "")
		require.Equal(t, uint32(137), f.wait(id, ""))
		f.remove(id, "")
		events := f.events.events()
		require.Equal(t, []string{"create " + id, "start " + id, "oom " + id, "exit " + id + "/" + id + " 137", "delete " + id + " 137"},
			events[len(events)-5:])
	}
}

func TestOOMWhileRunning(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	f.OnOOM("c")
	f.OnOOM("unknown")
	f.pods.Last().Container("c").InitProcess().Exit(137)
	f.wait("c", "")
	require.Equal(t, []string{"create c", "start c", "oom c", "exit c/c 137"}, f.events.events())
}

func TestUnknownTask(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"State":     func() error { _, err := f.State(ctx, &taskapi.StateRequest{ID: "c"}); return err },
		"Start":     func() error { _, err := f.Start(ctx, &taskapi.StartRequest{ID: "c"}); return err },
		"Delete":    func() error { _, err := f.Delete(ctx, &taskapi.DeleteRequest{ID: "c"}); return err },
		"DeleteX":   func() error { _, err := f.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "x"}); return err },
		"Pids":      func() error { _, err := f.Pids(ctx, &taskapi.PidsRequest{ID: "c"}); return err },
		"Pause":     func() error { _, err := f.Pause(ctx, &taskapi.PauseRequest{ID: "c"}); return err },
		"Resume":    func() error { _, err := f.Resume(ctx, &taskapi.ResumeRequest{ID: "c"}); return err },
		"Kill":      func() error { _, err := f.Kill(ctx, &taskapi.KillRequest{ID: "c"}); return err },
		"Exec":      func() error { _, err := f.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c"}); return err },
		"ResizePty": func() error { _, err := f.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c"}); return err },
		"CloseIO":   func() error { _, err := f.CloseIO(ctx, &taskapi.CloseIORequest{ID: "c"}); return err },
		"Update":    func() error { _, err := f.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c"}); return err },
		"Wait":      func() error { _, err := f.Wait(ctx, &taskapi.WaitRequest{ID: "c"}); return err },
		"Stats":     func() error { _, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "c"}); return err },
	} {
		require.ErrorIs(t, call(), errdefs.ErrNotFound, name)
	}
	_, err := f.Connect(ctx, &taskapi.ConnectRequest{ID: "c"})
	require.NoError(t, err)
}

func TestPauseResumeUpdateKillAll(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	_, err := f.Pause(t.Context(), &taskapi.PauseRequest{ID: "c"})
	require.NoError(t, err)
	_, err = f.Resume(t.Context(), &taskapi.ResumeRequest{ID: "c"})
	require.NoError(t, err)
	require.Equal(t, []string{"create c", "start c", "paused c", "resumed c"}, f.events.events())

	limit := int64(1 << 20)
	data, err := json.Marshal(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})
	require.NoError(t, err)
	const url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
	_, err = f.Update(t.Context(), &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{TypeUrl: url, Value: data}})
	require.NoError(t, err)
	require.Equal(t, limit, *f.pods.Last().Container("c").Updates[0].Memory.Limit)
	for _, bad := range []*anypb.Any{nil, {TypeUrl: "x"}, {TypeUrl: url, Value: []byte("1")}} {
		_, err = f.Update(t.Context(), &taskapi.UpdateTaskRequest{ID: "c", Resources: bad})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}

	_, err = f.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 15, All: true})
	require.NoError(t, err)
	require.Equal(t, []uint32{15}, f.pods.Last().Container("c").InitProcess().Signals)
	require.Equal(t, 1, f.pods.Last().Container("c").InitProcess().All)
}

func TestCloseStopsThePod(t *testing.T) {
	f := newFixture(t)
	f.create("c", nil)
	f.start("c", "")
	require.NoError(t, f.Close(t.Context()))
	require.False(t, f.pods.Last().Ready())
	require.Equal(t, []string{"create c", "start c", "exit c/c 137"}, f.events.events())
}

func TestResultsAreBounded(t *testing.T) {
	var r results
	for i := range 3 * maxResults {
		r.add(fmt.Sprint(i), "", &taskapi.DeleteResponse{})
		r.add(fmt.Sprint(i), "", &taskapi.DeleteResponse{})
	}
	require.Len(t, r.byKey, maxResults)
	require.Len(t, r.order, maxResults)
}
