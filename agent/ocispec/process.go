// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"path"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// Bounds of oom_score_adj. The agent itself is never an OOM victim (-1000), and no container gets as safe as that.
	minOOMScoreAdj, maxOOMScoreAdj = -998, 1000
	// maxGroups is the kernel's NGROUPS_MAX.
	maxGroups = 65536
)

// rlimits are the resource limits of setrlimit(2) by their names in a runtime spec.
var rlimits = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

// Process copies what is allowed of a process. AppArmor and SELinux names are dropped, they are profiles of the
// host; so are CPU affinities, which count the host's CPUs.
func (g *Guest) Process(in *specs.Process, terminal bool) (*specs.Process, error) {
	switch {
	case len(in.Args) == 0 || in.Args[0] == "":
		return nil, refused("process.args is empty")
	case !path.IsAbs(in.Cwd):
		return nil, refused("process.cwd %q is not an absolute path", in.Cwd)
	case strings.ContainsRune(in.Cwd, 0):
		return nil, refused("process.cwd has a NUL byte")
	case in.Terminal != terminal:
		return nil, refused("process.terminal is %t, but stdio.terminal is %t", in.Terminal, terminal)
	case in.Scheduler != nil:
		return nil, refused("process.scheduler is not supported")
	case len(in.User.AdditionalGids) > maxGroups:
		return nil, refused("process.user has %d additional groups, the limit is %d", len(in.User.AdditionalGids), maxGroups)
	}
	for _, s := range [][]string{in.Args, in.Env} {
		for _, v := range s {
			if strings.ContainsRune(v, 0) {
				return nil, refused("process.args or process.env has a NUL byte")
			}
		}
	}
	out := &specs.Process{
		Terminal:        terminal,
		ConsoleSize:     in.ConsoleSize,
		User:            specs.User{UID: in.User.UID, GID: in.User.GID, Umask: in.User.Umask, AdditionalGids: in.User.AdditionalGids},
		Args:            in.Args,
		Env:             in.Env,
		Cwd:             in.Cwd,
		Capabilities:    in.Capabilities,
		NoNewPrivileges: in.NoNewPrivileges,
		IOPriority:      in.IOPriority,
	}
	if in.User.Umask != nil && *in.User.Umask > 0o777 {
		return nil, refused("process.user.umask %#o is not a umask", *in.User.Umask)
	}
	// Always set: without one the process would inherit the agent's.
	adj := 0
	if in.OOMScoreAdj != nil {
		adj = min(max(*in.OOMScoreAdj, minOOMScoreAdj), maxOOMScoreAdj)
	}
	out.OOMScoreAdj = &adj
	seen := map[string]bool{}
	for _, r := range in.Rlimits {
		if _, ok := rlimits[r.Type]; !ok {
			return nil, refused("process.rlimits: %q is not known", r.Type)
		}
		if seen[r.Type] {
			return nil, refused("process.rlimits: %q is named twice", r.Type)
		}
		seen[r.Type] = true
		if r.Type == "RLIMIT_NOFILE" && g.nrOpen > 0 {
			// The host's fs.nr_open may be larger than the guest's, and setrlimit fails above it.
			r.Hard, r.Soft = min(r.Hard, g.nrOpen), min(r.Soft, g.nrOpen)
		}
		out.Rlimits = append(out.Rlimits, r)
	}
	return out, nil
}

// LibcontainerProcess turns a checked process into libcontainer's form, without its stdio.
func LibcontainerProcess(p *specs.Process) *libcontainer.Process {
	out := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		NoNewPrivileges: &p.NoNewPrivileges,
		IOPriority:      p.IOPriority,
	}
	for _, gid := range p.User.AdditionalGids {
		out.AdditionalGroups = append(out.AdditionalGroups, int(gid))
	}
	if c := p.Capabilities; c != nil {
		out.Capabilities = &configs.Capabilities{
			Bounding:    c.Bounding,
			Effective:   c.Effective,
			Inheritable: c.Inheritable,
			Permitted:   c.Permitted,
			Ambient:     c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		out.Rlimits = append(out.Rlimits, configs.Rlimit{Type: rlimits[r.Type], Hard: r.Hard, Soft: r.Soft})
	}
	if s := p.ConsoleSize; s != nil {
		out.ConsoleWidth, out.ConsoleHeight = uint16(min(s.Width, 0xffff)), uint16(min(s.Height, 0xffff))
	}
	return out
}
