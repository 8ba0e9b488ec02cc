// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapPrefix starts the names of all of Cloister's tap devices.
const tapPrefix = "cloister"

const tunDevice = "/dev/net/tun"

// tapNames starts the names of one sandbox's tap devices: whose a tap is can be told from the namespace alone. With the digit
// of the interface it fills IFNAMSIZ.
func tapNames(sandbox string) string {
	sum := sha256.Sum256([]byte(sandbox))
	return tapPrefix + hex.EncodeToString(sum[:3])
}

// isTap reports whether an interface is a tap device of any sandbox, isTapOf whether it is one of this sandbox's.
func isTap(l netlink.Link) bool {
	return l.Type() == "tuntap" && strings.HasPrefix(l.Attrs().Name, tapPrefix)
}

func isTapOf(l netlink.Link, sandbox string) bool {
	return l.Type() == "tuntap" && strings.HasPrefix(l.Attrs().Name, tapNames(sandbox))
}

// newTap makes a tap device in the namespace. It vanishes with the last copy of the fd. The fd does not block, which
// QEMU wants as well.
func newTap(ctx context.Context, ns *os.File, name string) (*os.File, error) {
	var tap *os.File
	err := Inside(ns, func() error {
		// The device goes to the namespace in which the file is opened (tun_chr_open), not where the ioctl is.
		fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
			return fmt.Errorf("open %s: %w (load the kernel module: modprobe tun): %w", tunDevice, err, errdefs.ErrFailedPrecondition)
		case err != nil:
			return fmt.Errorf("open %s: %w", tunDevice, err)
		}
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("tap device name %q: %w", name, err)
		}
		// IFF_VNET_HDR lets checksums and segmentation offload pass through to the guest. QEMU wants it with fd=.
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			unix.Close(fd)
			return fmt.Errorf("make tap device %q (TUNSETIFF): %w", name, err)
		}
		// Before the device is up: the host's stack shall not send the guest its own IPv6 start-up messages.
		// /proc/sys/net is that of the calling thread's namespace.
		knob := filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
		if err := os.WriteFile(knob, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("tap", name).Debug("IPv6 of the tap device stays on; the guest may see the host's router " +
				"solicitations")
		}
		// Only now: epoll does not work on the file before TUNSETIFF (golang.org/issue/30426).
		tap = os.NewFile(uintptr(fd), tunDevice)
		return nil
	})
	return tap, err
}
