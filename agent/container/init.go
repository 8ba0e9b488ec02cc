// SPDX-License-Identifier: Apache-2.0

package container

import (
	"os"
	"os/signal"

	_ "github.com/opencontainers/cgroups/devices" // the device controller of cgroup v2, in eBPF
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // C code that joins and makes namespaces before Go's runtime starts
	"golang.org/x/sys/unix"
)

const (
	// pausePath is where the pod's pause process sees the agent's executable, and its argv[0].
	pausePath = "/pause"
	pauseArg  = "pause"
)

// MaybeInit must be the first call of main, and of TestMain. If this process is not the agent but a copy of it that is
// about to become a container's process, or the pod's pause process, it never returns.
func MaybeInit() {
	if len(os.Args) != 2 {
		return
	}
	switch {
	case os.Args[1] == "init" && os.Getenv("_LIBCONTAINER_INITPIPE") != "":
		libcontainer.Init()
	case os.Args[1] == pauseArg && os.Args[0] == pausePath && os.Getpid() == 1:
		pause()
	}
}

// pause is PID 1 of the pod's shared pid namespace: it reaps whatever is orphaned there and does nothing else.
func pause() {
	// Go handles these signals, and would end on them even as PID 1 of a namespace.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM)
	exits := make(chan os.Signal, 1)
	signal.Notify(exits, unix.SIGCHLD)
	_, _ = os.Stdout.Write([]byte{0}) // startPause waits for it
	_ = os.Stdout.Close()
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
		<-exits
	}
}
