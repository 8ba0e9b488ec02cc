// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Limits of what a file may hold (design rule 7).
const (
	maxFileBytes    = 1 << 20
	maxDropIns      = 64
	maxListItems    = 128
	maxStringBytes  = 4096
	maxParamsBytes  = 1024 // of the 2048 that a kernel command line of x86-64 may have
	maxStateDirLen  = 48   // sun_path has 108 bytes; ids and socket names go below the directory
	maxDuration     = 24 * time.Hour
	minGuestMiB     = 128
	maxMemoryMiB    = 64 << 20 // 64 TiB, more than any machine: a guard against overflow in later arithmetic
	maxVCPUs        = 4096
	maxHotplugPorts = 24 // root ports on q35's bus 0 beside what is made at boot
)

// problem is why a value is refused and what to do about it.
type problem struct{ reason, fix string }

// setting is one key: where its value goes and which values it takes. set gets what go-toml makes of a value: string,
// int64, float64, bool, []any, map[string]any or a date.
type setting struct {
	key string
	set func(c *Config, raw any) *problem
}

func text(key string, field func(*Config) *string, check func(string) *problem) setting {
	return setting{key, func(c *Config, raw any) *problem {
		s, ok := raw.(string)
		if !ok {
			return wrongType(raw, `text in quotes`)
		}
		if p := plainText(s); p != nil {
			return p
		}
		if check != nil {
			if p := check(s); p != nil {
				return p
			}
		}
		*field(c) = s
		return nil
	}}
}

func number(key string, field func(*Config) *int, low, high int) setting {
	return setting{key, func(c *Config, raw any) *problem {
		n, ok := raw.(int64)
		if !ok {
			return wrongType(raw, "a whole number")
		}
		if n < int64(low) || n > int64(high) {
			return &problem{fmt.Sprintf("%d is out of range", n), fmt.Sprintf("give %d to %d", low, high)}
		}
		*field(c) = int(n)
		return nil
	}}
}

// numberOrZero is number with 0 taken too, for keys where it stands for "no limit" or "chosen by Cloister".
func numberOrZero(key string, field func(*Config) *int, low, high int) setting {
	s := number(key, field, low, high)
	return setting{key, func(c *Config, raw any) *problem {
		if raw == int64(0) {
			*field(c) = 0
			return nil
		}
		if p := s.set(c, raw); p != nil {
			if _, ok := raw.(int64); ok {
				p.fix = fmt.Sprintf("give 0 or %d to %d", low, high)
			}
			return p
		}
		return nil
	}}
}

func duration(key string, field func(*Config) *time.Duration, low time.Duration) setting {
	return setting{key, func(c *Config, raw any) *problem {
		s, ok := raw.(string)
		if !ok {
			return wrongType(raw, `a duration in quotes such as "30s" or "2m30s"`)
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			return &problem{fmt.Sprintf("%q is not a duration", clip(s)), `give one such as "30s" or "2m30s"`}
		}
		if d < low || d > maxDuration {
			return &problem{fmt.Sprintf("%s is out of range", d), fmt.Sprintf("give %s to %s", low, maxDuration)}
		}
		*field(c) = d
		return nil
	}}
}

func flag(key string, field func(*Config) *bool) setting {
	return setting{key, func(c *Config, raw any) *problem {
		b, ok := raw.(bool)
		if !ok {
			return wrongType(raw, "true or false")
		}
		*field(c) = b
		return nil
	}}
}

func list(key string, field func(*Config) *[]string, check func([]string) *problem) setting {
	return setting{key, func(c *Config, raw any) *problem {
		items, ok := raw.([]any)
		if !ok {
			return wrongType(raw, `a list of texts such as ["a", "b"]`)
		}
		if len(items) > maxListItems {
			return &problem{fmt.Sprintf("%d entries", len(items)), fmt.Sprintf("give at most %d", maxListItems)}
		}
		texts := make([]string, 0, len(items))
		for i, item := range items {
			s, ok := item.(string)
			if !ok {
				p := wrongType(item, "text in quotes")
				p.reason = fmt.Sprintf("entry %d: %s", i+1, p.reason)
				return p
			}
			if p := plainText(s); p != nil {
				p.reason = fmt.Sprintf("entry %d: %s", i+1, p.reason)
				return p
			}
			texts = append(texts, s)
		}
		if p := check(texts); p != nil {
			return p
		}
		*field(c) = texts
		return nil
	}}
}

// settings is the table of all keys, in the order of cloister.toml. It is built anew by each call: the package keeps
// no mutable state, and it is used once in a shim's life.
func settings() []setting {
	return slices.Concat(hypervisorSettings(), teeSettings(), podSettings())
}

func hypervisorSettings() []setting {
	return []setting{
		text("hypervisor.kind", func(c *Config) *string { return &c.Hypervisor.Kind }, oneOf(KindQEMU, KindCloudHypervisor)),
		text("hypervisor.arch", func(c *Config) *string { return &c.Hypervisor.Arch }, emptyOr(oneOf(ArchAMD64, ArchS390X))),
		text("hypervisor.path", func(c *Config) *string { return &c.Hypervisor.Path }, emptyOr(absolutePath)),
		text("hypervisor.accel", func(c *Config) *string { return &c.Hypervisor.Accel }, oneOf(AccelAuto, AccelKVM, AccelTCG)),
		text("hypervisor.cpu_model", func(c *Config) *string { return &c.Hypervisor.CPUModel }, cpuModel),
		text("hypervisor.kernel", func(c *Config) *string { return &c.Hypervisor.Kernel }, absolutePath),
		text("hypervisor.initrd", func(c *Config) *string { return &c.Hypervisor.Initrd }, absolutePath),
		list("hypervisor.kernel_params", func(c *Config) *[]string { return &c.Hypervisor.KernelParams }, kernelParams),
		text("hypervisor.vsock", func(c *Config) *string { return &c.Hypervisor.Vsock }, oneOf(VsockAuto, VsockVhost, VsockVhostUser)),
		flag("hypervisor.sandbox", func(c *Config) *bool { return &c.Hypervisor.Sandbox }),
		text("hypervisor.virtiofsd", func(c *Config) *string { return &c.Hypervisor.Virtiofsd }, emptyOr(absolutePath)),
	}
}

func podSettings() []setting {
	return []setting{
		number("sizing.default_vcpus", func(c *Config) *int { return &c.Sizing.DefaultVCPUs }, 1, maxVCPUs),
		number("sizing.default_memory_mib", func(c *Config) *int { return &c.Sizing.DefaultMemoryMiB }, 2*minGuestMiB, maxMemoryMiB),
		number("sizing.overhead_memory_mib", func(c *Config) *int { return &c.Sizing.OverheadMemoryMiB }, minGuestMiB, maxMemoryMiB),
		numberOrZero("sizing.grow_vcpus", func(c *Config) *int { return &c.Sizing.GrowVCPUs }, 1, maxVCPUs),
		numberOrZero("sizing.grow_memory_mib", func(c *Config) *int { return &c.Sizing.GrowMemoryMiB }, minGuestMiB, maxMemoryMiB),
		numberOrZero("sizing.max_vcpus", func(c *Config) *int { return &c.Sizing.MaxVCPUs }, 1, maxVCPUs),
		numberOrZero("sizing.max_memory_mib", func(c *Config) *int { return &c.Sizing.MaxMemoryMiB }, 2*minGuestMiB, maxMemoryMiB),
		number("sizing.hotplug_ports", func(c *Config) *int { return &c.Sizing.HotplugPorts }, 0, maxHotplugPorts),
		flag("sizing.free_page_reporting", func(c *Config) *bool { return &c.Sizing.FreePageReporting }),

		duration("timeouts.boot", func(c *Config) *time.Duration { return &c.Timeouts.Boot }, time.Second),
		duration("timeouts.stop", func(c *Config) *time.Duration { return &c.Timeouts.Stop }, 100*time.Millisecond),
		duration("timeouts.rpc", func(c *Config) *time.Duration { return &c.Timeouts.RPC }, time.Second),
		duration("timeouts.create_container", func(c *Config) *time.Duration { return &c.Timeouts.CreateContainer }, time.Second),
		duration("timeouts.hotplug", func(c *Config) *time.Duration { return &c.Timeouts.Hotplug }, time.Second),
		duration("timeouts.cleanup", func(c *Config) *time.Duration { return &c.Timeouts.Cleanup }, time.Second),

		text("rootfs.cache_dir", func(c *Config) *string { return &c.Rootfs.CacheDir }, absolutePath),
		numberOrZero("rootfs.cache_max_mib", func(c *Config) *int { return &c.Rootfs.CacheMaxMiB }, 16, maxMemoryMiB),
		numberOrZero("rootfs.writable_layer_max_mib", func(c *Config) *int { return &c.Rootfs.WritableLayerMaxMiB }, 1, maxMemoryMiB),

		text("scratch.dir", func(c *Config) *string { return &c.Scratch.Dir }, absolutePath),
		numberOrZero("scratch.size_mib", func(c *Config) *int { return &c.Scratch.SizeMiB }, 64, 16<<20),

		text("state.dir", func(c *Config) *string { return &c.State.Dir }, stateDir),

		list("annotations.allowed", func(c *Config) *[]string { return &c.Annotations.Allowed }, annotationKeys),

		text("log.level", func(c *Config) *string { return &c.Log.Level }, oneOf("trace", "debug", "info", "warn", "error")),
		flag("log.debug_console", func(c *Config) *bool { return &c.Log.DebugConsole }),
	}
}

// crossCheck finds values that are fine alone but not together.
func crossCheck(c *Config) Faults {
	var fs Faults
	if s := c.Sizing; s.MaxVCPUs > 0 && s.DefaultVCPUs > s.MaxVCPUs {
		fs = append(fs, c.Fault("sizing.default_vcpus",
			fmt.Sprintf("%d is more than sizing.max_vcpus = %d", s.DefaultVCPUs, s.MaxVCPUs), "lower it, or raise the maximum"))
	}
	// A maximum below the built-in default is the default (vmplan.SizeVM).
	if s := c.Sizing; s.MaxMemoryMiB > 0 && s.DefaultMemoryMiB > s.MaxMemoryMiB && c.origins["sizing.default_memory_mib"].file != builtIn {
		fs = append(fs, c.Fault("sizing.default_memory_mib",
			fmt.Sprintf("%d is more than sizing.max_memory_mib = %d", s.DefaultMemoryMiB, s.MaxMemoryMiB), "lower it, or raise the maximum"))
	}
	if s := c.Sizing; s.MaxMemoryMiB > 0 && s.OverheadMemoryMiB > s.MaxMemoryMiB {
		fs = append(fs, c.Fault("sizing.overhead_memory_mib",
			fmt.Sprintf("%d is more than sizing.max_memory_mib = %d", s.OverheadMemoryMiB, s.MaxMemoryMiB), "lower it, or raise the maximum"))
	}
	if below(c.Rootfs.CacheDir, c.State.Dir) {
		fs = append(fs, c.Fault("rootfs.cache_dir", fmt.Sprintf("%s is inside state.dir = %s", c.Rootfs.CacheDir, c.State.Dir),
			"give a directory that outlives a reboot, outside of state.dir"))
	}
	return fs
}

func wrongType(raw any, want string) *problem {
	var got string
	switch v := raw.(type) {
	case string:
		got = fmt.Sprintf("text %q", clip(v))
	case int64:
		got = fmt.Sprintf("the number %d", v)
	case float64:
		got = fmt.Sprintf("the fraction %v", v)
	case bool:
		got = fmt.Sprintf("%v", v)
	case []any:
		got = "a list"
	case map[string]any:
		got = "a table"
	default:
		got = fmt.Sprintf("a value of type %T", v)
	}
	return &problem{"is " + got, "give " + want}
}

func plainText(s string) *problem {
	if len(s) > maxStringBytes {
		return &problem{fmt.Sprintf("is %d bytes long", len(s)), fmt.Sprintf("give at most %d", maxStringBytes)}
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return &problem{fmt.Sprintf("%q has control characters", clip(s)), "remove them"}
	}
	return nil
}

func oneOf(values ...string) func(string) *problem {
	return func(s string) *problem {
		if slices.Contains(values, s) {
			return nil
		}
		return &problem{fmt.Sprintf("%q is not known", clip(s)), "give " + orList(values)}
	}
}

func emptyOr(check func(string) *problem) func(string) *problem {
	return func(s string) *problem {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

func absolutePath(s string) *problem {
	if !filepath.IsAbs(s) || filepath.Clean(s) != s {
		return &problem{fmt.Sprintf("%q is not a clean absolute path", clip(s)),
			`give one that starts with "/" and has no "..", "//" or "/" at the end`}
	}
	return nil
}

func stateDir(s string) *problem {
	if p := absolutePath(s); p != nil {
		return p
	}
	if len(s) > maxStateDirLen {
		return &problem{fmt.Sprintf("is %d bytes long", len(s)), fmt.Sprintf("give at most %d: unix sockets live below it and their paths are "+
			"limited", maxStateDirLen)}
	}
	if s == "/" {
		return &problem{`is "/"`, "give a directory of its own"}
	}
	return nil
}

// cpuModel keeps a value of -cpu one word, so that it stays one argument and cannot carry a second option.
func cpuModel(s string) *problem {
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.,=+", r)) {
			return &problem{fmt.Sprintf("%q has the character %q", clip(s), r),
				`give a model with features as QEMU's -cpu takes it, for example "EPYC-v4" or "host,pmu=off"`}
		}
	}
	return nil
}

// reservedParams decide what the guest's PID 1 is, or end the kernel's own parameters: Cloister sets them itself, and all
// that begin with wire.ParamPrefix, which speak to the agent.
var reservedParams = [...]string{"init", "rdinit", "root", "initrd"}

func kernelParams(params []string) *problem {
	total := 0
	for i, p := range params {
		name, _, _ := strings.Cut(p, "=")
		switch {
		case p == "":
			return &problem{fmt.Sprintf("entry %d is empty", i+1), "remove it"}
		case strings.ContainsAny(p, " \"'") || !isASCII(p):
			return &problem{fmt.Sprintf("entry %d: %q has spaces, quotes or characters outside of ASCII", i+1, clip(p)),
				"give one parameter an entry, without quotes"}
		case p == "--" || slices.Contains(reservedParams[:], name) || strings.HasPrefix(name, wire.ParamPrefix):
			return &problem{fmt.Sprintf("entry %d: %q is set by Cloister itself", i+1, clip(p)), "remove it"}
		}
		total += len(p) + 1
	}
	if total > maxParamsBytes {
		return &problem{fmt.Sprintf("is %d bytes long in all", total), fmt.Sprintf("give at most %d", maxParamsBytes)}
	}
	return nil
}

func annotationKeys(keys []string) *problem {
	for _, k := range keys {
		if _, ok := annotationTable()[k]; !ok {
			return &problem{fmt.Sprintf("%q is not an annotation that Cloister knows", clip(k)),
				"give some of " + strings.Join(AnnotationKeys(), ", ")}
		}
	}
	return nil
}

// below reports whether path is dir or inside it; both are clean and absolute.
func below(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > 0x7e })
}

// clip keeps what is quoted in a fault short.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

func orList(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = fmt.Sprintf("%q", v)
	}
	if len(quoted) < 2 {
		return strings.Join(quoted, "")
	}
	return strings.Join(quoted[:len(quoted)-1], ", ") + " or " + quoted[len(quoted)-1]
}
