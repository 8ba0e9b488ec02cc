// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
	"github.com/cloister-project/cloister/tee/abi"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(fakeVariable); mode != "" {
		runFakeVMM(mode)
	}
	goleak.VerifyTestMain(m)
}

// settleTimeout is for what the test waits for; it ends nothing that works.
const settleTimeout = 30 * time.Second

// script makes an executable file.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cloud-hypervisor")
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700))
	return path
}

// fakeDriver starts VMMs with a fault ("none" for none).
func fakeDriver(t *testing.T, mode string) (*Driver, hypervisor.Document) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	d := New(Config{Arch: hypervisor.ArchAMD64, Path: script(t, fmt.Sprintf("exec env %s=%s %s \"$@\"\n", fakeVariable, mode, self))})
	kernel := make([]byte, 1024)
	kernel[0x1fe], kernel[0x1ff] = 0x55, 0xaa
	copy(kernel[0x202:], "HdrS")
	path := filepath.Join(t.TempDir(), "kernel")
	require.NoError(t, os.WriteFile(path, kernel, 0o600))
	doc := document()
	doc.Boot.Kernel, doc.Boot.Initrd = path, path
	return d, doc
}

// stateDir is a directory with a path short enough for sockets. In the end only the logs are left in it.
func stateDir(t *testing.T, left ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ch")
	require.NoError(t, err)
	t.Cleanup(func() {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		require.Equal(t, left, names)
		require.NoError(t, os.RemoveAll(dir))
	})
	return dir
}

// start starts a VM whose state directory has only the logs in the end, and whose process is gone.
func start(t *testing.T, mode string, change func(*hypervisor.Document, *hypervisor.Resources)) *vm {
	t.Helper()
	d, doc := fakeDriver(t, mode)
	res := hypervisor.Resources{StateDir: stateDir(t, "console.log", "vmm.log")}
	if change != nil {
		change(&doc, &res)
	}
	h, err := d.Start(t.Context(), doc, res)
	require.NoError(t, err)
	v := h.(*vm)
	t.Cleanup(func() {
		v.Kill()
		require.NoDirExists(t, fmt.Sprintf("/proc/%d", v.PID()))
		if t.Failed() {
			t.Log(v.Exit())
		}
	})
	return v
}

// waitLog waits for a text in the VMM's log.
func waitLog(t *testing.T, v *vm, text string) {
	t.Helper()
	timer := time.NewTimer(settleTimeout)
	defer timer.Stop()
	for {
		all, changed := v.Logs.VMM.Text()
		if strings.Contains(all, text) {
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			require.Failf(t, "timeout", "waiting for %q in the log:\n%s", text, all)
		}
	}
}

func waitEnd(t *testing.T, v *vm) hypervisor.Exit {
	t.Helper()
	select {
	case <-v.Done():
		return v.Exit()
	case <-time.After(settleTimeout):
		require.Fail(t, "the VM did not end")
		return hypervisor.Exit{}
	}
}

// testDisk is an image that begins with its id.
func testDisk(t *testing.T, id string, readonly bool) hypervisor.Disk {
	t.Helper()
	d := hypervisor.Disk{ID: id, Serial: "serial-" + id, Path: filepath.Join(t.TempDir(), "image"), ReadOnly: readonly}
	require.NoError(t, os.WriteFile(d.Path, []byte(id+strings.Repeat(".", 512)), 0o600))
	return d
}

func TestStartAndStop(t *testing.T) {
	for _, sandboxed := range []bool{true, false} {
		t.Run(fmt.Sprint("sandboxed=", sandboxed), func(t *testing.T) {
			r, tap, err := os.Pipe()
			require.NoError(t, err)
			defer r.Close()
			var pid int
			v := start(t, "none", func(d *hypervisor.Document, res *hypervisor.Resources) {
				d.Sandboxed = sandboxed
				d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01"}}
				d.Disks = []hypervisor.Disk{testDisk(t, "boot", true)}
				res.Taps = map[string]*os.File{"eth0": tap}
				res.OnStart = func(p int) error { pid = p; return nil }
			})
			require.Equal(t, v.PID(), pid)
			waitLog(t, v, "request vm.add-net 1")
			require.NoError(t, v.AddDisk(t.Context(), testDisk(t, "early", false)))
			require.NoError(t, v.Boot(t.Context()))
			require.ErrorIs(t, v.Boot(t.Context()), errdefs.ErrFailedPrecondition)
			require.NoError(t, v.AddDisk(t.Context(), testDisk(t, "late", true)))
			for _, said := range []string{
				"disk disk-boot serial-boot segment 1: boot",
				"disk disk-early serial-early segment 1: early",
				"disk disk-late serial-late segment 1: late",
			} {
				waitLog(t, v, said)
			}
			denied := "another file: <nil>"
			if sandboxed {
				denied = "another file: open /etc/hostname: permission denied"
			}
			waitLog(t, v, denied)

			c, err := v.Vsock().Dial(t.Context(), 1024)
			require.NoError(t, err)
			_, err = io.WriteString(c, "hello")
			require.NoError(t, err)
			require.NoError(t, c.CloseWrite())
			echo, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "hello", string(echo))
			require.NoError(t, c.Close())

			for _, id := range []string{"late", "early", "boot"} {
				require.NoError(t, v.RemoveDisk(t.Context(), id), id)
				require.ErrorIs(t, v.RemoveDisk(t.Context(), id), errdefs.ErrNotFound)
			}
			require.Empty(t, v.images)
			require.NoError(t, v.AddDisk(t.Context(), testDisk(t, "late", false)), "id and place are free again")

			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			require.NoError(t, v.Stop(ctx))
			require.NoError(t, v.Stop(ctx))
			require.Equal(t, hypervisor.ExitStopped, v.Exit().Reason)
			require.Contains(t, v.Exit().Console, "the guest is up")
			require.ErrorIs(t, v.AddDisk(t.Context(), testDisk(t, "after", true)), errdefs.ErrFailedPrecondition)
			require.ErrorIs(t, v.RemoveDisk(t.Context(), "late"), errdefs.ErrFailedPrecondition)
			require.ErrorIs(t, v.AddSharedDirectory(t.Context(), hypervisor.SharedDirectory{ID: "x", Tag: "x", Socket: "/x"}),
				errdefs.ErrResourceExhausted)
			_, err = r.Read(make([]byte, 1))
			require.ErrorIs(t, err, io.EOF, "no copy of the tap is left")
		})
	}
}

func TestStartFaults(t *testing.T) {
	for mode, want := range map[string]struct {
		kind error
		text string
	}{
		"dies": {nil, "Cloud Hypervisor exited with status 1\nVMM said:\ncloud-hypervisor: no such thing"},
		"fails:vm.create": {errdefs.ErrInternal,
			"PUT /api/v1/vm.create: the VMM answers with status 500: Error from API: The [1mdevice is broken"},
		"ends:vm.create":    {nil, "Cloud Hypervisor exited with status 7"},
		"cut:vm.create":     {io.ErrUnexpectedEOF, "vm.create"},
		"half:vm.create":    {io.ErrUnexpectedEOF, "vm.create"},
		"garbage:vm.create": {errdefs.ErrInvalidArgument, "vm.create: the VMM's reply"},
		"ends:vm.add-net":   {nil, "Cloud Hypervisor exited with status 7"},
		"fails:vm.add-net":  {errdefs.ErrInternal, "vm.add-net"},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d, doc := fakeDriver(t, mode)
			r, tap, err := os.Pipe()
			require.NoError(t, err)
			defer r.Close()
			doc.Sandboxed = true
			doc.Disks = []hypervisor.Disk{testDisk(t, "boot", true)}
			doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01"}}
			_, err = d.Start(t.Context(), doc, hypervisor.Resources{StateDir: stateDir(t), Taps: map[string]*os.File{"eth0": tap}})
			require.ErrorContains(t, err, "start Cloud Hypervisor: ")
			require.ErrorContains(t, err, want.text)
			if want.kind != nil {
				require.ErrorIs(t, err, want.kind)
			} else {
				var exit hypervisor.Exit
				require.ErrorAs(t, err, &exit)
			}
			require.NotContains(t, err.Error(), "\x1b")
			_, err = r.Read(make([]byte, 1))
			require.ErrorIs(t, err, io.EOF, "no copy of the tap is left")
		})
	}
}

// The fake launches nothing: what is shown is what is asked of a VMM for SEV-SNP, and of whom.
func TestStartSNP(t *testing.T) {
	snp := func(d *hypervisor.Document, _ *hypervisor.Resources) {
		kernel := d.Boot.Kernel
		snpDocument(d)
		d.Boot.Firmware, d.Sandboxed = kernel, false // landlock's rules name /dev/sev, which few machines have
	}
	v := start(t, "none", snp)
	waitLog(t, v, "request vmm.ping 0\nrequest vm.create 0")
	for mode, want := range map[string]struct {
		kind error
		text string
	}{
		"released:vmm.ping": {errdefs.ErrNotImplemented, "was built without fw_cfg, igvm, sev_snp"},
		"fails:vmm.ping":    {errdefs.ErrInternal, "vmm.ping"},
		"garbage:vmm.ping":  {errdefs.ErrInvalidArgument, "vmm.ping"},
	} {
		d, doc := fakeDriver(t, mode)
		snp(&doc, nil)
		_, err := d.Start(t.Context(), doc, hypervisor.Resources{StateDir: stateDir(t)})
		require.ErrorIs(t, err, want.kind, mode)
		require.ErrorContains(t, err, want.text)
	}
	d, doc := fakeDriver(t, "none")
	snp(&doc, nil)
	doc.Boot.Firmware = "/nonexistent.igvm"
	_, err := d.Start(t.Context(), doc, hypervisor.Resources{StateDir: stateDir(t)})
	require.ErrorContains(t, err, "/nonexistent.igvm")
}

func TestStartGivenUp(t *testing.T) {
	d, doc := fakeDriver(t, "silent:vm.create")
	ctx, cancel := context.WithCancel(t.Context())
	var pid int
	_, err := d.Start(ctx, doc, hypervisor.Resources{StateDir: stateDir(t), OnStart: func(p int) error {
		pid = p
		time.AfterFunc(50*time.Millisecond, cancel) // when the request is under way, or before: both must end
		return nil
	}})
	require.ErrorIs(t, err, context.Canceled)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", pid))
}

func TestStartRefuses(t *testing.T) {
	boom := errors.New("boom")
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document, *hypervisor.Resources)
		want   error
		text   string
	}{
		"document":  {func(d *hypervisor.Document, _ *hypervisor.Resources) { d.CPU.Count = 0 }, errdefs.ErrInvalidArgument, "cpu.count"},
		"no initrd": {func(d *hypervisor.Document, _ *hypervisor.Resources) { d.Boot.Initrd = "/nonexistent" }, os.ErrNotExist, "boot.initrd"},
		"no kernel": {func(d *hypervisor.Document, _ *hypervisor.Resources) { d.Boot.Kernel = "/dev/null" },
			errdefs.ErrInvalidArgument, "boot.kernel"},
		"no tap": {func(d *hypervisor.Document, _ *hypervisor.Resources) {
			d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01"}}
		}, errdefs.ErrInvalidArgument, "nic eth0: no tap"},
		"disk": {func(d *hypervisor.Document, _ *hypervisor.Resources) {
			d.Disks = []hypervisor.Disk{{ID: "a", Serial: "a", Path: "/dev/null"}}
		}, errdefs.ErrInvalidArgument, "neither a regular file nor a block device"},
		"state directory": {func(_ *hypervisor.Document, r *hypervisor.Resources) { r.StateDir = "/nonexistent" },
			errdefs.ErrInvalidArgument, "state directory"},
		"memory": {func(d *hypervisor.Document, _ *hypervisor.Resources) { d.Memory.Bytes = 1 << 50 },
			errdefs.ErrResourceExhausted, "MiB of memory"},
		"host's side": {func(_ *hypervisor.Document, r *hypervisor.Resources) { r.OnStart = func(int) error { return boom } },
			boom, "set up the host's side"},
	} {
		t.Run(name, func(t *testing.T) {
			d, doc := fakeDriver(t, "none")
			res := hypervisor.Resources{StateDir: stateDir(t)}
			tc.change(&doc, &res)
			_, err := d.Start(t.Context(), doc, res)
			require.ErrorIs(t, err, tc.want)
			require.ErrorContains(t, err, tc.text)
		})
	}
}

func TestEnds(t *testing.T) {
	for mode, want := range map[string]hypervisor.Exit{
		"powers-off":      {Reason: hypervisor.ExitStopped, Detail: "the guest powered off"},
		"resets":          {Reason: hypervisor.ExitGuestPanic, Detail: "Kernel panic - not syncing: Attempted to kill init!"},
		"resets-silently": {Reason: hypervisor.ExitGuestPanic, Detail: "the guest reset itself, without a kernel panic on its console"},
		"reports-panic":   {Reason: hypervisor.ExitGuestPanic, Detail: "the guest reported a panic"},
		"exits":           {Reason: hypervisor.ExitVMM, Detail: "Cloud Hypervisor exited with status 3"},
		"says-nonsense":   {Reason: hypervisor.ExitVMM, Detail: "report of the event monitor: invalid character 'h'"},
		"says-much":       {Reason: hypervisor.ExitVMM, Detail: "report of the event monitor: it has more than 16384 bytes"},
		"hangs":           {Reason: hypervisor.ExitVMM, Detail: "Cloud Hypervisor closed its event monitor and did not end"},
		"ends:vm.boot":    {Reason: hypervisor.ExitVMM, Detail: "Cloud Hypervisor exited with status 7"},
	} {
		t.Run(mode, func(t *testing.T) {
			v := start(t, mode, nil)
			if err := v.Boot(t.Context()); err != nil {
				require.ErrorIs(t, err, errdefs.ErrFailedPrecondition) // it was gone before it could answer
			}
			exit := waitEnd(t, v)
			require.Equal(t, want.Reason, exit.Reason, exit)
			require.Contains(t, exit.Detail, want.Detail)
			require.ErrorIs(t, v.AddDisk(t.Context(), testDisk(t, "after", true)), errdefs.ErrFailedPrecondition)
		})
	}
}

func TestKilled(t *testing.T) {
	v := start(t, "none", nil)
	require.NoError(t, v.Boot(t.Context()))
	p, err := os.FindProcess(v.PID())
	require.NoError(t, err)
	require.NoError(t, p.Kill())
	exit := waitEnd(t, v)
	require.Equal(t, hypervisor.ExitVMM, exit.Reason)
	require.Contains(t, exit.Detail, "Cloud Hypervisor was killed by signal 9")
}

func TestBootRefused(t *testing.T) {
	for _, mode := range []string{"fails:vm.boot", "half:vm.boot", "slow:vm.boot"} {
		t.Run(mode, func(t *testing.T) {
			v := start(t, mode, nil)
			err := v.Boot(t.Context())
			switch mode {
			case "slow:vm.boot":
				require.NoError(t, err)
			case "fails:vm.boot":
				require.ErrorIs(t, err, errdefs.ErrInternal)
				require.ErrorContains(t, err, "Cloud Hypervisor said:")
			default:
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			}
		})
	}
}

func TestBinary(t *testing.T) {
	noExecutable := script(t, "")
	require.NoError(t, os.Chmod(noExecutable, 0o600))
	for name, tc := range map[string]struct {
		path string
		want error
		text string
	}{
		"missing":        {"/nonexistent", os.ErrNotExist, "correct hypervisor.path"},
		"no executable":  {noExecutable, errdefs.ErrInvalidArgument, "no executable file"},
		"old":            {script(t, "echo cloud-hypervisor v52.0"), errdefs.ErrNotImplemented, "install v53 or newer"},
		"something else": {script(t, "echo hello 53.0"), errdefs.ErrInvalidArgument, "is it a Cloud Hypervisor?"},
		"broken":         {script(t, "echo no library; exit 127"), nil, "it said: no library"},
		"endless":        {script(t, "yes cloud-hypervisor | head -c 1000000"), errdefs.ErrInvalidArgument, "is it a Cloud Hypervisor?"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(Config{Arch: hypervisor.ArchAMD64, Path: tc.path}).Capabilities(t.Context())
			require.ErrorContains(t, err, tc.text)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
			}
		})
	}
	_, err := New(Config{Arch: hypervisor.ArchS390X}).Binary()
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	for text, major := range map[string]int{"cloud-hypervisor v53.0": 53, "cloud-hypervisor v104.1-12-gabc": 104} {
		got, err := parseVersion(text)
		require.NoError(t, err)
		require.Equal(t, major, got)
	}
	d := New(Config{Arch: hypervisor.ArchAMD64, Path: script(t, "echo cloud-hypervisor v53.0-1-gabc")})
	c, err := d.Capabilities(t.Context())
	require.NoError(t, err)
	require.Equal(t, "cloud-hypervisor v53.0-1-gabc", c.Version)
	require.Equal(t, map[abi.Platform]string{abi.SNP: ""}, c.Platforms)
}

func TestAccelerator(t *testing.T) {
	d := New(Config{Arch: hypervisor.ArchAMD64, Path: script(t, "echo cloud-hypervisor v53.0")})
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	kvm := hostcheck.KVM{Device: write("kvm", ""), CPUInfo: write("amd", "flags : svm\n")}
	none := hostcheck.KVM{Device: kvm.Device, CPUInfo: write("none", "flags : fpu\n")}
	for _, tc := range []struct {
		host hostcheck.KVM
		want string
		err  error
	}{
		{kvm, "auto", nil}, {kvm, "", nil}, {kvm, "kvm", nil}, {kvm, "tcg", errdefs.ErrNotImplemented}, {kvm, "xen", errdefs.ErrInvalidArgument},
		{none, "auto", errdefs.ErrUnavailable}, {none, "kvm", errdefs.ErrUnavailable},
	} {
		d.host = tc.host
		got, err := d.Accelerator(t.Context(), tc.want)
		if tc.err != nil {
			require.ErrorIs(t, err, tc.err, tc.want)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, hypervisor.AccelKVM, got)
	}
}

func FuzzReadEvents(f *testing.F) {
	for _, seed := range []string{
		"", `{"source": "vm", "event": "booted", "properties": null}{"source": "vmm", "event": "shutdown"}`, `{"source": 1}`, `[]`, `{`, "hello?",
		`{"timestamp": {"secs": 1, "nanos": 2}, "source": "virtio-device", "event": "activated", "properties": {"id": "disk-a"}}`,
		strings.Repeat("[", 2*maxEvent), `{"source": "` + strings.Repeat("x", 2*maxEvent) + `"}`, strings.Repeat(" ", 2*maxEvent),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &counter{r: strings.NewReader(string(data))}
		last := 0
		err := readEvents(r, func(e event) {
			if len(e.Source) > maxEvent || len(e.Event) > maxEvent {
				t.Fatalf("%d and %d bytes", len(e.Source), len(e.Event))
			}
			last = r.n
		})
		if r.n-last > 2*maxEvent {
			t.Fatalf("%d bytes were read for one report", r.n-last)
		}
		if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
	})
}

type counter struct {
	r io.Reader
	n int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}
