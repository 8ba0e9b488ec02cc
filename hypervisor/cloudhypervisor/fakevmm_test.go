// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
)

// fakeVariable makes the test binary a VMM with Cloud Hypervisor's API that misbehaves in the way its value says: "FAULT" or
// "FAULT:REQUEST".
const fakeVariable = "CLOISTER_TEST_FAKE_CLOUD_HYPERVISOR"

// fakeVMM takes what the OpenAPI document has and nothing else. It logs what it did to stderr.
type fakeVMM struct {
	fault, at string
	events    *os.File

	config  map[string]any // of vm.create
	disks   []map[string]any
	booted  bool
	devices map[string]*os.File // open disks by id
	removed map[string]*os.File // those that the guest has not let go of
}

// runFakeVMM never returns.
func runFakeVMM(mode string) {
	args := os.Args[1:]
	if slices.Equal(args, []string{"--version"}) {
		fmt.Println("cloud-hypervisor v53.0")
		os.Exit(0)
	}
	f := &fakeVMM{devices: map[string]*os.File{}, removed: map[string]*os.File{}}
	f.fault, f.at, _ = strings.Cut(mode, ":")
	if f.fault == "dies" {
		fmt.Fprintln(os.Stderr, "cloud-hypervisor: \x1b[31mno such thing\x07")
		os.Exit(1)
	}
	var socket, events uintptr
	if n, err := fmt.Sscanf(strings.Join(args, " "), "--api-socket fd=%d --event-monitor fd=%d --seccomp", &socket, &events); n != 2 {
		fmt.Fprintln(os.Stderr, "arguments:", args, err)
		os.Exit(2)
	}
	f.events = os.NewFile(events, "events")
	l, err := net.FileListener(os.NewFile(socket, "api"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "api socket:", err)
		os.Exit(2)
	}
	// What landlock forbids, it forbids a thread.
	runtime.LockOSThread()
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(3)
		}
		f.serve(c.(*net.UnixConn))
	}
}

func (f *fakeVMM) event(source, name string) {
	fmt.Fprintf(f.events, "{\n  \"timestamp\": {\n    \"secs\": 1,\n    \"nanos\": 2\n  },\n  \"source\": %q,\n  \"event\": %q,\n"+
		"  \"properties\": null\n}", source, name)
}

// serve takes one request of a connection, with the files that came with its first bytes.
func (f *fakeVMM) serve(c *net.UnixConn) {
	defer c.Close()
	data, oob := make([]byte, 64<<10), make([]byte, 256)
	n, oobn, _, _, err := c.ReadMsgUnix(data, oob)
	if err != nil {
		return
	}
	var files []*os.File
	messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range messages {
		rights, _ := unix.ParseUnixRights(&m)
		for _, fd := range rights {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	req, err := http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(data[:n]), c)))
	if err != nil {
		return
	}
	body, _ := io.ReadAll(req.Body)
	r := hypervisor.Request{Method: req.Method, Path: req.URL.Path, Body: body}
	name := strings.TrimPrefix(r.Path, "/api/v1/")
	fmt.Fprintln(os.Stderr, "request", name, len(files))
	fault := ""
	if f.at == name {
		fault = f.fault
	}
	status, reply := 400, any(append([]string{"Bad Request"}, checkRequest(r)...))
	if len(checkRequest(r)) == 0 {
		status, reply = f.do(fault, name, body, files)
	}
	text := ""
	if reply != nil {
		b, _ := json.Marshal(reply)
		text = string(b)
	}
	answer := fmt.Sprintf("HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n", status)
	if status != 204 {
		answer += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(text))
	}
	answer += "\r\n" + text
	switch fault {
	case "silent":
		_, _ = io.Copy(io.Discard, c) // until the other side gives up
	case "cut":
	case "half":
		_, _ = io.WriteString(c, answer[:len(answer)/2])
	case "slow":
		for i := range len(answer) {
			_, _ = io.WriteString(c, answer[i:i+1])
		}
	case "garbage":
		_, _ = io.WriteString(c, "\x00\x01 what?\r\n\r\n")
	default:
		_, _ = io.WriteString(c, answer)
	}
}

func failed(words ...string) (int, any) {
	return 500, append([]string{"Error from API"}, words...)
}

func (f *fakeVMM) do(fault, name string, body []byte, files []*os.File) (status int, reply any) {
	switch fault {
	case "fails":
		return failed("The \x1b[1mdevice\x07 is broken")
	case "ends":
		os.Exit(7)
	}
	var given map[string]any
	_ = json.Unmarshal(body, &given)
	switch {
	case name == "vmm.ping" && fault == "released":
		return 200, map[string]any{"version": "v53.0.0", "features": []string{"io_uring", "kvm"}}
	case name == "vmm.ping":
		return 200, map[string]any{"version": "v53.0.0", "features": []string{"fw_cfg", "igvm", "io_uring", "kvm", "sev_snp"}}
	case name == "vm.create" && f.config != nil:
		return failed("VM is already created")
	case name != "vm.create" && f.config == nil:
		return 404, []string{"VM is not created"}
	case name == "vm.create":
		f.config = given
		disks, _ := given["disks"].([]any)
		for _, d := range disks {
			f.disks = append(f.disks, d.(map[string]any))
		}
		if given["landlock_enable"] == true {
			if err := f.landlock(); err != nil {
				return failed("landlock", err.Error())
			}
		}
		return 204, nil
	case name == "vm.boot":
		return f.boot()
	case name == "vm.add-disk" && !f.booted:
		f.disks = append(f.disks, given)
		return 204, nil
	case name == "vm.add-disk":
		if err := f.open(given); err != nil {
			return failed("Cannot open disk path", err.Error())
		}
		return 200, map[string]string{"id": given["id"].(string), "bdf": "0001:00:01.0"}
	case name == "vm.remove-device":
		return f.remove(given["id"].(string))
	case name == "vm.add-net":
		if len(files)*2 != int(given["num_queues"].(float64)) {
			return failed("number of files")
		}
		return 204, nil
	case name == "vm.add-fs":
		c, err := net.Dial("unix", given["socket"].(string))
		if err != nil {
			return failed("Cannot create virtio-fs device", err.Error())
		}
		_ = c.Close()
		return 200, map[string]string{"id": given["id"].(string), "bdf": "0000:00:05.0"}
	}
	return 404, []string{"Not Found"}
}

// landlock does to this thread what Cloud Hypervisor does to its own in vm.create: reading and writing files is left where the
// configuration and its rules name them.
func (f *fakeVMM) landlock() error {
	const read, write = unix.LANDLOCK_ACCESS_FS_READ_FILE, unix.LANDLOCK_ACCESS_FS_WRITE_FILE
	const makeSocket = unix.LANDLOCK_ACCESS_FS_MAKE_SOCK
	attr := unix.LandlockRulesetAttr{Handled_access_fs: read | write | makeSocket}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Handled_access_fs), 0)
	if errno != 0 {
		return errno
	}
	allow := func(path string, access uint64) error {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("rule for %s: %w", path, err)
		}
		defer unix.Close(fd)
		rule := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
		_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
		if errno != 0 {
			return fmt.Errorf("rule for %s: %w", path, errno)
		}
		return nil
	}
	payload := f.config["payload"].(map[string]any)
	socket := f.config["vsock"].(map[string]any)["socket"].(string)
	errs := []error{
		allow(payload["kernel"].(string), read), allow(payload["initramfs"].(string), read), allow(filepath.Dir(socket), makeSocket),
	}
	for _, d := range f.disks {
		access := uint64(read)
		if d["readonly"] == false {
			access |= write
		}
		errs = append(errs, allow(d["path"].(string), access))
	}
	for _, r := range f.config["landlock_rules"].([]any) {
		access := map[string]uint64{"r": read, "rw": read | write | makeSocket}[r.(map[string]any)["access"].(string)]
		errs = append(errs, allow(r.(map[string]any)["path"].(string), access))
	}
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); errno != 0 {
		return errno
	}
	return unix.Close(int(set))
}

// open opens a disk and logs its first bytes.
func (f *fakeVMM) open(d map[string]any) error {
	flags := os.O_RDWR
	if d["readonly"] == true {
		flags = os.O_RDONLY
	}
	file, err := os.OpenFile(d["path"].(string), flags, 0)
	if err != nil {
		return err
	}
	head := make([]byte, 8)
	n, _ := file.Read(head)
	fmt.Fprintf(os.Stderr, "disk %s %s segment %v: %s\n", d["id"], d["serial"], d["pci_segment"], head[:n])
	f.devices[d["id"].(string)] = file
	return nil
}

// remove does what the guest's part in it needs: it lets go at once, or (fault "holds") when it is asked again.
func (f *fakeVMM) remove(id string) (int, any) {
	if file := f.removed[id]; file != nil {
		delete(f.removed, id)
		_ = file.Close()
		return 404, []string{"No such device"}
	}
	if !f.booted {
		i := slices.IndexFunc(f.disks, func(d map[string]any) bool { return d["id"] == id })
		if i < 0 {
			return 404, []string{"No such device"}
		}
		f.disks = slices.Delete(f.disks, i, i+1)
		return 204, nil
	}
	file := f.devices[id]
	if file == nil {
		return 404, []string{"No such device"}
	}
	delete(f.devices, id)
	if f.fault == "holds" {
		f.removed[id] = file
		return 204, nil
	}
	go file.Close() // some time after the answer
	return 204, nil
}

func (f *fakeVMM) boot() (int, any) {
	if f.booted {
		return failed("VM is already booted")
	}
	f.event("vm", "booting")
	for _, d := range f.disks {
		if err := f.open(d); err != nil {
			return failed("Cannot open disk path", err.Error())
		}
	}
	_, err := os.ReadFile("/etc/hostname")
	fmt.Fprintln(os.Stderr, "another file:", err)
	if err := f.vsock(); err != nil {
		return failed("Cannot create virtio-vsock backend", err.Error())
	}
	f.booted = true
	f.event("vm", "booted")
	fmt.Println("the guest is up")
	switch f.fault {
	case "powers-off":
		f.event("vm", "shutdown")
		f.event("vm", "deleted")
		f.event("vmm", "shutdown")
		os.Exit(0)
	case "resets":
		fmt.Println("[    1.0] Kernel panic - not syncing: Attempted to kill init!")
		f.event("vm", "rebooting")
	case "resets-silently":
		f.event("vm", "rebooting")
	case "reports-panic":
		f.event("guest", "panic")
		f.event("vm", "rebooting")
	case "exits":
		os.Exit(3)
	case "says-nonsense":
		fmt.Fprint(f.events, "hello?")
	case "says-much":
		fmt.Fprintf(f.events, "{\"source\": \"%s\"}", strings.Repeat("x", 2*maxEvent))
	case "hangs":
		_ = f.events.Close()
	}
	return 204, nil
}

// vsock serves the device's socket: every port of the guest sends back what it gets, to its end.
func (f *fakeVMM) vsock() error {
	l, err := net.Listen("unix", f.config["vsock"].(map[string]any)["socket"].(string))
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "CONNECT ") {
					return
				}
				_, _ = io.WriteString(c, "OK 1073741824\n")
				_, _ = io.Copy(c, r)
			}()
		}
	}()
	return nil
}
