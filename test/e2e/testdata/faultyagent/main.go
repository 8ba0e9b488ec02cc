// SPDX-License-Identifier: Apache-2.0

// Command faultyagent is a guest's PID 1 that fails in the way that the kernel parameter e2e.fault asks for. It is put
// into a copy of the guest image's initrd in the agent's place.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/boot"
	"github.com/cloister-project/cloister/agent/container"
	"github.com/cloister-project/cloister/agent/network"
	"github.com/cloister-project/cloister/agent/server"
	"github.com/cloister-project/cloister/agent/storage"
)

func init() { runtime.LockOSThread() }

func main() {
	container.MaybeInit()
	fault := parameter("e2e.fault")
	fmt.Println("faultyagent: fault", fault)
	err := fail(context.Background(), fault)
	fmt.Println("faultyagent: cannot go on:", err)
	os.Exit(1)
}

// parameter reads the kernel's command line; proc is not mounted yet, and boot mounts its own.
func parameter(name string) string {
	_ = os.Mkdir("/e2e", 0o700)
	if err := unix.Mount("proc", "/e2e", "proc", 0, ""); err != nil {
		return err.Error()
	}
	line, _ := os.ReadFile("/e2e/cmdline")
	_ = unix.Unmount("/e2e", 0)
	for _, field := range strings.Fields(string(line)) {
		if value, ok := strings.CutPrefix(field, name+"="); ok {
			return value
		}
	}
	return ""
}

func fail(ctx context.Context, fault string) error {
	switch fault {
	case "exit":
		return errors.New("told to exit")
	case "sleep":
		forever()
	}
	system, err := boot.Init(ctx)
	if err != nil {
		return err
	}
	switch fault {
	case "other-protocol":
		return hello(ctx, &agentv1.Hello{ProtocolMajor: 99, AgentVersion: "from-the-future"})
	case "garbage":
		return garbage(ctx)
	case "exit-later":
		return serve(ctx, system, system)
	case "stays-up":
		return serve(ctx, system, staysUp{system})
	}
	return fmt.Errorf("%q is no fault", fault)
}

// forever does nothing. Not select: the runtime would take it for a deadlock, and end.
func forever() {
	for {
		time.Sleep(time.Hour)
	}
}

// hello introduces itself, prints what the host answers, and stays.
func hello(ctx context.Context, h *agentv1.Hello) error {
	conn, err := server.Vsock().DialReady(ctx)
	if err != nil {
		return err
	}
	if err := wire.WriteFrame(conn, h); err != nil {
		return err
	}
	reply := &agentv1.HelloReply{}
	err = wire.ReadFrame(conn, reply)
	fmt.Println("faultyagent: the host answers", reply, err)
	forever()
	return nil
}

// garbage says what is no frame: its length is beyond every limit.
func garbage(ctx context.Context) error {
	conn, err := server.Vsock().DialReady(ctx)
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte("\xff\xff\xff\xffgarbage")); err != nil {
		return err
	}
	forever()
	return nil
}

// staysUp does not power off when it is told to.
type staysUp struct{ *boot.System }

func (staysUp) PowerOff() {
	fmt.Println("faultyagent: staying up")
	forever()
}

// exitPort is where a connection ends this process.
const exitPort = "7"

// serve is what the real agent does; besides, it exits when somebody connects to exitPort of the pod.
func serve(ctx context.Context, system *boot.System, offered server.System) error {
	store, err := storage.New("/run/cloister/storage")
	if err != nil {
		return err
	}
	store.After(system.WaitModules)
	s := server.New(server.Config{
		System: offered, Storage: store, Network: network.Apply, Transport: server.Vsock(),
		StateDir: "/run/cloister/state", Version: "faulty",
	})
	l, err := net.Listen("tcp", ":"+exitPort)
	if err != nil {
		return err
	}
	go func() {
		if _, err := l.Accept(); err == nil {
			fmt.Println("faultyagent: told to exit")
			os.Exit(1)
		}
	}()
	served, end := context.WithCancelCause(ctx)
	go func() { end(errors.Join(errors.New("the server ended"), s.Run(ctx))) }()
	if err := system.Reaper().Run(served); err != nil {
		return err
	}
	return context.Cause(served)
}
