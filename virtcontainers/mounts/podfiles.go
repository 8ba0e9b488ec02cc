// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// PodFiles is what the pod's own /etc/hosts, /etc/hostname and /etc/resolv.conf are written from, where the host has none
// for it.
type PodFiles struct {
	Hostname  string
	Addresses []netip.Addr
	DNS       DNS
}

// DNS of a pod.
type DNS struct {
	Servers, Searches, Options []string
}

// file reads the host's file, or writes one where there is none.
func (p PodFiles) file(m Mount) (*agentv1.FileCopy, error) {
	file, err := readFileCopy(m)
	if errors.Is(err, fs.ErrNotExist) {
		return &agentv1.FileCopy{Content: p.generate(filepath.Clean(m.Destination)), Mode: 0o644}, nil
	}
	return file, err
}

func (p PodFiles) generate(destination string) []byte {
	var b strings.Builder
	switch destination {
	case "/etc/hostname":
		fmt.Fprintln(&b, p.Hostname)
	case "/etc/resolv.conf":
		if len(p.DNS.Servers)+len(p.DNS.Searches)+len(p.DNS.Options) == 0 {
			// No DNS settings: the pod gets the node's, as with containerd's own sandboxes.
			host, err := os.ReadFile("/etc/resolv.conf")
			if err == nil && len(host) <= wire.MaxFileCopy {
				return host
			}
		}
		if len(p.DNS.Searches) > 0 {
			fmt.Fprintf(&b, "search %s\n", strings.Join(p.DNS.Searches, " "))
		}
		for _, s := range p.DNS.Servers {
			fmt.Fprintf(&b, "nameserver %s\n", s)
		}
		if len(p.DNS.Options) > 0 {
			fmt.Fprintf(&b, "options %s\n", strings.Join(p.DNS.Options, " "))
		}
	case "/etc/hosts":
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
		for _, addr := range p.Addresses {
			fmt.Fprintf(&b, "%s\t%s\n", addr, p.Hostname)
		}
	}
	return []byte(b.String())
}
