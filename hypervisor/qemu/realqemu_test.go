// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/hypervisor/vsock/vhostuser"
	"github.com/cloister-project/cloister/tee/abi"
)

// s390xQEMUVariable is the path of a QEMU for s390x; a test that lacks it is skipped.
const s390xQEMUVariable = "CLOISTER_TEST_QEMU_S390X"

// driverFor returns a driver with the real binary of an architecture.
func driverFor(t testing.TB, arch hypervisor.Architecture) *Driver {
	t.Helper()
	if arch == hypervisor.ArchAMD64 {
		return testDriver(t)
	}
	path := os.Getenv(s390xQEMUVariable)
	if path == "" {
		t.Skip(s390xQEMUVariable + " (the path of qemu-system-s390x) is not set")
	}
	d := New(Config{Path: path, Arch: arch, CacheDir: filepath.Join(vmtest.CacheDir(t), "qemu")})
	probed(t, d)
	return d
}

// outcome of a QEMU that was given a command line: either it came up with its virtual CPUs stopped, or it ended.
type outcome struct {
	status string // of query-status
	said   string
}

// launch gives a command line to a real QEMU, with a real file behind each inherited one.
func launch(t *testing.T, path string, c commandLine) outcome {
	t.Helper()
	var files []*os.File
	var conn io.Closer
	var control net.Conn
	defer func() {
		supervise.CloseFiles(files)
		if conn != nil {
			conn.Close()
		}
	}()
	for _, name := range c.files {
		switch {
		case name == fileQMP:
			ours, theirs, err := socketPair(name)
			require.NoError(t, err)
			control, files = ours, append(files, theirs)
		case name == fileConsole:
			ours, theirs, err := socketPair(name)
			require.NoError(t, err)
			conn, files = ours, append(files, theirs)
		case name == fileVsock:
			dev, err := vhostuser.New(vhostuser.Config{GuestCID: 3})
			require.NoError(t, err)
			defer dev.Close()
			files = append(files, dev.QEMUFile())
		case strings.HasPrefix(name, fileTap):
			_, tap := vmtest.NetNS(t)
			files = append(files, tap)
		default: // vhost-net, which is left out
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			require.NoError(t, err)
			files = append(files, null)
		}
	}
	output, stderr, err := os.Pipe()
	require.NoError(t, err)
	p, err := supervise.Start(supervise.Command{Name: "QEMU", Path: path, Args: c.args, Files: files, Stdout: stderr, Stderr: stderr})
	require.NoError(t, err)
	stderr.Close()
	supervise.CloseFiles(files)
	said := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(output)
		said <- string(b)
	}()

	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Timeout)
	defer cancel()
	var o outcome
	if client, err := qmp.New(ctx, control, nil); err == nil {
		var status struct{ Status string }
		if client.Execute(ctx, "query-status", nil, &status) == nil {
			o.status = status.Status
		}
		client.Close()
		<-client.Done()
		require.NoError(t, p.Kill())
	}
	select {
	case <-p.Done():
	case <-time.After(vmtest.Timeout):
		_ = p.Kill()
		<-p.Done()
	}
	o.said = <-said
	output.Close()
	return o
}

// realFiles puts real files in the place of those that the golden documents name.
func realFiles(t *testing.T, arch hypervisor.Architecture) *strings.Replacer {
	t.Helper()
	dir := t.TempDir()
	file := func(name string, size int) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, make([]byte, size), 0o600))
		return path
	}
	kernel := file("s390x-kernel", s390HeaderEnd)
	if arch == hypervisor.ArchAMD64 {
		kernel = vmtest.KernelImage(t, arch)
	}
	return strings.NewReplacer(goldenKernel, kernel, goldenInitrd, file("initrd", 512), goldenFirmware, file("firmware", 128<<10),
		goldenLayer, file("layer,0", 4096), goldenScratch, file("scratch", 4096),
		// It is a file here, not a block device.
		`"driver":"host_device"`, `"driver":"file"`)
}

func (c commandLine) replaced(change func(option, value string) (string, bool)) commandLine {
	out := commandLine{files: c.files}
	for i := 0; i < len(c.args); i++ {
		if i+1 == len(c.args) || strings.HasPrefix(c.args[i+1], "-") {
			out.args = append(out.args, c.args[i])
			continue
		}
		option, value := c.args[i], c.args[i+1]
		i++
		if v, keep := change(option, value); keep {
			out.args = append(out.args, option, v)
		}
	}
	return out
}

// with replaces the accelerator. vhost-net is left out: it is rarely where the tests run.
func (c commandLine) with(accel string) commandLine {
	return c.replaced(func(option, value string) (string, bool) {
		switch option {
		case "-accel":
			value = accel
		case "-netdev":
			value, _, _ = strings.Cut(value, ",vhost=on")
		}
		return value, true
	})
}

// bare is the command line without what needs a platform's hardware: it must come up.
func (c commandLine) bare(accel, cpu string) commandLine {
	return c.with(accel).replaced(func(option, value string) (string, bool) {
		switch option {
		case "-object":
			return value, !strings.Contains(value, `"`+teeObjectID+`"`)
		case "-machine":
			value = strings.ReplaceAll(value, ",confidential-guest-support="+teeObjectID, "")
		case "-cpu":
			value = cpu
		case "-device":
			return value, !strings.HasPrefix(value, "vhost-vsock-") // checkProperties looks at its properties
		}
		return value, true
	})
}

// TestRealQEMUTakesEveryCommandLine gives each golden command line to the real binary. Those of a confidential platform
// must end with the accelerator's refusal and nothing else, since QEMU parses all options before it asks the
// accelerator; to see the devices made too, the same line is run without the platform's object. Hardware protects
// nothing here.
func TestRealQEMUTakesEveryCommandLine(t *testing.T) {
	for name, tc := range goldenCases() {
		t.Run(name, func(t *testing.T) {
			arch := tc.doc.Arch()
			d := driverFor(t, arch)
			withTC := withTypes(features(t, d), tc)
			c := tc.commandLine(t, withTC)
			files := realFiles(t, arch)
			c = c.replaced(func(_, value string) (string, bool) { return files.Replace(value), true })
			requireProperties(t, d, c)

			o := launch(t, probed(t, d).path, c.bare("tcg,thread=multi", "max"))
			require.Equal(t, "prelaunch", o.status, o.said)

			if tc.doc.Confidential == nil || tc.doc.Confidential.Platform == abi.Sample {
				if arch == hypervisor.ArchAMD64 && hasKVM() {
					o := launch(t, probed(t, d).path, c.bare("kvm", "qemu64"))
					require.Equal(t, "prelaunch", o.status, o.said)
				}
				return
			}
			kvm := "kvm"
			if arch == hypervisor.ArchAMD64 {
				kvm += ",kernel-irqchip=split"
			}
			for given, accel := range map[string]hypervisor.Accelerator{"tcg,thread=multi": hypervisor.AccelTCG, kvm: hypervisor.AccelKVM} {
				t.Run(string(accel), func(t *testing.T) {
					want := refusal(t, tc.doc, accel, features(t, d))
					o := launch(t, probed(t, d).path, c.with(given))
					require.Empty(t, o.status)
					lines := strings.Split(strings.TrimSpace(o.said), "\n")
					require.Equal(t, want, lines[0][strings.Index(lines[0], ": ")+2:], o.said)
				})
			}
		})
	}
}

// TestStartWithoutTheHardware: the driver's error has QEMU's own words, as an Exit that the platform can explain.
func TestStartWithoutTheHardware(t *testing.T) {
	d := testDriver(t)
	doc := snpDocument()
	files := realFiles(t, hypervisor.ArchAMD64)
	doc.Boot.Kernel, doc.Boot.Initrd = files.Replace(goldenKernel), files.Replace(goldenInitrd)
	doc.Boot.Firmware = files.Replace(goldenFirmware)
	doc.NICs = nil
	said := refusal(t, doc, hypervisor.AccelKVM, features(t, d))
	_, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: t.TempDir()})
	require.ErrorContains(t, err, said)
	require.ErrorContains(t, err, "QEMU exited with status 1")
	var exit hypervisor.Exit
	require.ErrorAs(t, err, &exit)
	require.Contains(t, exit.VMMLog, said)

	doc.Accelerator = hypervisor.AccelTCG
	_, err = d.Start(context.Background(), doc, hypervisor.Resources{StateDir: t.TempDir()})
	require.ErrorContains(t, err, "only KVM has confidential VMs")
}

func hasKVM() bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	return err == nil
}

// refusal is what QEMU says first of a document whose platform is not there.
func refusal(t *testing.T, doc hypervisor.Document, accel hypervisor.Accelerator, f Features) string {
	object, err := teeObject(doc)
	require.NoError(t, err)
	var o plainObject
	require.NoError(t, json.Unmarshal(object, &o))
	if f.Objects[o.Type] == nil && o.Type != typeSE {
		return "-object " + string(object) + ": Parameter 'qom-type' does not accept value '" + o.Type + "'"
	}
	if !slices.Contains(f.Types, o.Type) {
		return "invalid object type: " + o.Type
	}
	if accel == hypervisor.AccelTCG {
		return "cannot set up private guest memory for " + o.Type + ": KVM required"
	}
	if !hasKVM() {
		t.Skip("no /dev/kvm here")
	}
	vmType, module := "SEV-SNP", "/sys/module/kvm_amd/parameters/sev_snp"
	if o.Type == typeTDX {
		vmType, module = "TDX", "/sys/module/kvm_intel/parameters/tdx"
	}
	if b, _ := os.ReadFile(module); len(b) > 0 && (b[0] == 'Y' || b[0] == '1') {
		t.Skipf("this host has the hardware (%s)", module)
	}
	return "-accel kvm,kernel-irqchip=split: vm-type " + vmType + " not supported by KVM"
}

// requireProperties checks that the binary has each device of a command line, with each of its properties.
func requireProperties(t *testing.T, d *Driver, c commandLine) {
	t.Helper()
	client := askQEMU(t, probed(t, d).path)
	c.replaced(func(option, value string) (string, bool) {
		if option != "-device" || strings.HasPrefix(value, "{") {
			return value, true
		}
		kind, rest, _ := strings.Cut(value, ",")
		var props []struct{ Name string }
		require.NoError(t, client.Execute(context.Background(), "device-list-properties", map[string]string{"typename": kind}, &props), value)
		for p := range strings.SplitSeq(rest, ",") {
			name, _, _ := strings.Cut(p, "=")
			if name != "id" && name != "bus" {
				require.True(t, slices.ContainsFunc(props, func(p struct{ Name string }) bool { return p.Name == name }), "%s has no property %q", kind,
					name)
			}
		}
		return value, true
	})
}

// askQEMU starts a binary without a machine.
func askQEMU(t *testing.T, path string) *qmp.Client {
	t.Helper()
	conn, theirs, err := socketPair(fileQMP)
	require.NoError(t, err)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	require.NoError(t, err)
	p, err := supervise.Start(supervise.Command{
		Name: "QEMU",
		Path: path,
		Args: []string{"-machine", "none", "-nodefaults", "-display", "none",
			"-chardev", "socket,id=qmp,fd=" + strconv.Itoa(supervise.FirstInheritedFD), "-mon", "chardev=qmp,mode=control"},
		Files: []*os.File{theirs}, Stdout: null, Stderr: null,
	})
	require.NoError(t, err)
	theirs.Close()
	null.Close()
	client, err := qmp.New(context.Background(), conn, nil)
	t.Cleanup(func() {
		if client != nil {
			client.Close()
			<-client.Done()
		}
		_ = p.Kill()
		<-p.Done()
	})
	require.NoError(t, err)
	return client
}

// TestObjectsMatchSchema checks names and types of our objects' properties against the binary's own schema.
func TestObjectsMatchSchema(t *testing.T) {
	d := driverFor(t, hypervisor.ArchAMD64)
	if os.Getenv("CLOISTER_TEST_QEMU_NEXT") != "" { // set by tools/qemu-next/run, which is there for TDX
		require.Contains(t, features(t, d).Types, typeTDX)
	}
	s, err := querySchema(context.Background(), askQEMU(t, probed(t, d).path))
	require.NoError(t, err)
	seen := 0
	for name, tc := range goldenCases() {
		object, err := teeObject(tc.doc)
		require.NoError(t, err)
		var given map[string]any
		if object == nil || json.Unmarshal(object, &given) != nil {
			continue
		}
		kind := given["qom-type"].(string)
		props := s.object(kind)
		if props == nil {
			require.NotContains(t, features(t, d).Types, kind)
			continue
		}
		seen++
		for p, value := range given {
			if p == "qom-type" || p == "id" {
				continue
			}
			require.Contains(t, props, p, name)
			e, ok := s.entry(props[p])
			require.True(t, ok)
			switch value.(type) {
			case string:
				require.Equal(t, "string", e.JSONType, "%s: %s", name, p)
			case float64:
				require.Equal(t, "int", e.JSONType, "%s: %s", name, p)
			case bool:
				require.Equal(t, "boolean", e.JSONType, "%s: %s", name, p)
			case map[string]any:
				require.Equal(t, "object", e.MetaType, "%s: %s", name, p)
			default:
				require.Fail(t, fmt.Sprintf("%s: %s is a %T", name, p, value))
			}
		}
	}
	require.NotZero(t, seen, "this QEMU has none of the platforms")
}
