// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Limits of a mount's options.
const (
	maxOptions     = 64
	maxOptionBytes = 256
)

// bindMount stands for a bind mount among the types of mounts.
const bindMount = "bind"

// flagOptions say how something is mounted, whatever it is.
var flagOptions = setOf(wire.MountOptions...)

// mountTypes are the mounts that a container may have, each with the options that are its own and what checks their
// values; a nil check means an option without a value. No regular expressions here: compiling them at the start would
// cost each process of a container, which begins as a copy of the agent.
var mountTypes = map[string]map[string]func(string) bool{
	"proc": {
		"hidepid": oneOf("0", "1", "2", "4", "off", "noaccess", "invisible", "ptraceable"),
		"gid":     decimal, "subset": oneOf("pid"),
	},
	"sysfs": {},
	"tmpfs": {
		"size": size, "nr_inodes": amount, "nr_blocks": amount, "mode": octal, "uid": decimal, "gid": decimal,
		"huge":    oneOf("never", "always", "within_size", "advise"),
		"inode32": nil, "inode64": nil, "swap": nil, "noswap": nil, "tmpcopyup": nil,
	},
	"ramfs":   {"mode": octal},
	"devpts":  {"newinstance": nil, "ptmxmode": octal, "mode": octal, "uid": decimal, "gid": decimal, "max": decimal},
	"mqueue":  {},
	"cgroup":  {},
	bindMount: {"bind": nil, "rbind": nil},
}

func setOf(names ...string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, n := range names {
		set[n] = true
	}
	return set
}

func oneOf(values ...string) func(string) bool {
	return func(s string) bool { return slices.Contains(values, s) }
}

// digits reports whether s is 1 to longest digits up to the given one.
func digits(s string, longest int, last rune) bool {
	return s != "" && len(s) <= longest && strings.IndexFunc(s, func(c rune) bool { return c < '0' || c > last }) < 0
}

func decimal(s string) bool { return digits(s, 10, '9') }
func octal(s string) bool   { return digits(s, 5, '7') }

// amount is a number with an optional k, m or g.
func amount(s string) bool {
	if s != "" && strings.ContainsRune("kKmMgG", rune(s[len(s)-1])) {
		s = s[:len(s)-1]
	}
	return digits(s, 20, '9')
}

// size is an amount or a percentage.
func size(s string) bool {
	if percent, ok := strings.CutSuffix(s, "%"); ok {
		return digits(percent, 3, '9')
	}
	return amount(s)
}

// ownOption reports whether an option is one of those of its type.
func ownOption(known map[string]func(string) bool, option string) bool {
	key, value, hasValue := strings.Cut(option, "=")
	check, ok := known[key]
	return ok && hasValue == (check != nil) && (check == nil || check(value))
}

// checkOptions refuses types and options of mounts that are not known.
func checkOptions(mountType string, options []string) error {
	known, ok := mountTypes[mountType]
	if !ok {
		return fmt.Errorf("file system type %.40q is not known: %w", mountType, errdefs.ErrInvalidArgument)
	}
	if len(options) > maxOptions {
		return fmt.Errorf("%d options, the limit is %d: %w", len(options), maxOptions, errdefs.ErrInvalidArgument)
	}
	bad := slices.IndexFunc(options, func(o string) bool {
		return len(o) > maxOptionBytes || !flagOptions[o] && !ownOption(known, o)
	})
	if bad >= 0 {
		return fmt.Errorf("option %.80q of a %s mount is not known: %w", options[bad], mountType, errdefs.ErrInvalidArgument)
	}
	return nil
}
