// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloister-project/cloister/test/harness"
)

// registry is where the registry listens, in the node's network namespace.
const registry = "127.0.0.1:5000"

// image is one that the registry serves: base with what crane's mutate changes. Names have no registry in front: it serves all.
type image struct {
	name string
	base string
	// args of "crane mutate": "--user", "1002".
	args []string
}

// Names of the images that others are made of.
const (
	debianBase  = "base/debian:1"
	toolsBase   = "base/tools:1" // Debian with busybox's programs in /bin
	busyboxBase = "base/busybox:1"
	pauseBase   = "base/pause:1"
)

const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// busyboxFirst is for images whose top has to run without a terminal.
const busyboxFirst = "PATH=/bin:" + searchPath

const criTools = "k8s-staging-cri-tools/"

// images lists what the suites pull. The spec that wants test-image-digest by its digest cannot be served.
func images() []image {
	nginx := func(name string, conf string) image {
		return image{name, toolsBase, []string{"--cmd", "nginx,-c,/etc/nginx/" + conf}}
	}
	list := []image{
		// What busybox has not, such as pgrep and ipcs, is Debian's.
		{"e2e-test-images/busybox:1.29-2", toolsBase, []string{"--cmd", "sh", "--env", busyboxFirst}},
		nginx("e2e-test-images/nginx:1.14-2", "suites-80.conf"),
		nginx(criTools+"hostnet-nginx-amd64:latest", "suites-12003.conf"),
		nginx("containerd/nginx:1.27.0", "suites-80.conf"),
		{"e2e-test-images/httpd:2.4.39-4", debianBase, []string{"--cmd", "httpd,-f,/etc/apache2/suites.conf,-D,FOREGROUND"}},
		{"e2e-test-images/resource-consumer:1.10", debianBase, []string{"--cmd", "sleep,infinity"}},
		{"pause:3.9", pauseBase, []string{"--entrypoint", "/pause"}},
		{"pause:3.10.2", pauseBase, []string{"--entrypoint", "/pause", "--label", "name=3.10.2"}},
		{"containerd/busybox:1.36", busyboxBase, []string{"--cmd", "sh"}},
		{"containerd/alpine:3.14.0", busyboxBase, []string{"--cmd", "sh", "--label", "name=alpine"}},
		{criTools + "test-image-predefined-group:latest", toolsBase, []string{"--env", busyboxFirst, "--user", "1000"}},
		{criTools + "test-image-user-uid:latest", toolsBase, []string{"--env", busyboxFirst, "--user", "1002"}},
		{criTools + "test-image-user-username:latest", toolsBase, []string{"--env", busyboxFirst, "--user", "www-data"}},
		{criTools + "test-image-user-uid-group:latest", toolsBase, []string{"--env", busyboxFirst, "--user", "1003:users"}},
		{criTools + "test-image-user-username-group:latest", toolsBase, []string{"--env", busyboxFirst, "--user", "www-data:100"}},
	}
	for _, name := range []string{"latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest"} {
		list = append(list, image{criTools + "test-image-" + name, busyboxBase, []string{"--label", "name=" + name}})
	}
	for _, tag := range []string{"1", "2", "3"} {
		list = append(list, image{criTools + "test-image-tags:" + tag, busyboxBase, []string{"--label", "name=tags"}})
	}
	return list
}

// debianFiles are laid over Debian's root file system.
func debianFiles() []harness.File {
	nginx := func(port string) []byte {
		return []byte(`user www-data;
daemon off;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events {}
http {
  access_log /dev/stdout;
  server { listen ` + port + `; listen [::]:` + port + `; root /usr/share/nginx/html; index index.html; }
}
`)
	}
	return []harness.File{
		{Name: "var/run", Link: "/run"},
		{Name: "etc/nginx/suites-80.conf", Body: nginx("80")},
		{Name: "etc/nginx/suites-12003.conf", Body: nginx("12003")},
		{Name: "usr/share/nginx/html/index.html", Body: []byte("<h1>Welcome to nginx!</h1>\n")},
		{Name: "var/lib/nginx", Dir: true}, {Name: "var/log/nginx", Dir: true},
		// The log that a spec looks into has the command's name.
		{Name: "usr/sbin/httpd", Link: "apache2"},
		{Name: "var/www/html/index.html", Body: []byte("<h1>It works!</h1>\n")},
		{Name: "etc/apache2/suites.conf", Body: []byte(`ServerName localhost
ServerRoot /etc/apache2
PidFile /run/httpd.pid
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
User www-data
Group www-data
Listen 80
DocumentRoot /var/www/html
DirectoryIndex index.html
ErrorLog /proc/self/fd/2
LogLevel notice
`)},
		{Name: "etc/passwd", Body: []byte(`root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
default-user:x:1000:1000::/home/default-user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`)},
		{Name: "etc/group", Body: []byte(`root:x:0:
daemon:x:1:
tty:x:5:
www-data:x:33:
users:x:100:
default-user:x:1000:
nogroup:x:65534:
group-defined-in-image:x:50000:default-user
`)},
		{Name: "etc/hostname", Body: []byte("image\n")},
	}
}

// programs are busybox's own files, all below /bin. Its ls is a file of its own: a spec masks /bin/ls, and a mount on a link
// would mask busybox.
func programs(busybox *harness.Image) []harness.File {
	var files []harness.File
	var body []byte
	for _, f := range busybox.Layers[0] {
		if f.Name == "bin/busybox" {
			body = f.Body
		}
		if strings.HasPrefix(f.Name, "bin/") && f.Name != "bin/ls" {
			files = append(files, f)
		}
	}
	return append(files, harness.File{Name: "bin/ls", Body: body, Mode: 0o755})
}

// smallImages are those of busybox and a few files, by their names.
func smallImages(ctx context.Context, n *harness.Node) (map[string]*harness.Image, error) {
	nnp, err := buildNNP(ctx, n)
	if err != nil {
		return nil, err
	}
	text := []byte("test_content\n")
	extra := map[string][]harness.File{
		busyboxBase:                      nil,
		"e2e-test-images/nonewprivs:1.3": {{Name: "nnp", Body: nnp, Mode: 0o4755}},
		pauseBase: {{Name: "pause", Mode: 0o755,
			Body: []byte("#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 3600 & wait $!; done\n")}},
		"containerd/volume-ownership:2.1": {{Name: "test_dir", Dir: true, UID: 65534, GID: 65534}},
		"containerd/volume-copy-up:2.2": {
			{Name: "test_dir", Dir: true}, {Name: "test_dir/test_file", Body: text},
			{Name: "C:", Dir: true}, {Name: "C:/weird_test_dir", Dir: true}, {Name: "C:/weird_test_dir/weird_test_file", Body: text},
			{Name: ":colon_prefixed", Dir: true}, {Name: ":colon_prefixed/colon_prefixed_file", Body: text},
		},
	}
	list := map[string]*harness.Image{}
	for name, files := range extra {
		im, err := harness.Busybox(name, n.Artifacts().Busybox)
		if err != nil {
			return nil, err
		}
		if files != nil {
			im.Layers = append(im.Layers, files)
		}
		list[name] = im
	}
	list["e2e-test-images/nonewprivs:1.3"].Config.Cmd = []string{"/nnp"}
	list["containerd/volume-ownership:2.1"].Config.Volumes = map[string]struct{}{"/test_dir": {}}
	list["containerd/volume-copy-up:2.2"].Config.Volumes = map[string]struct{}{
		"/test_dir": {}, "C:/weird_test_dir": {}, "/:colon_prefixed": {},
	}
	return list, nil
}

// makeImages fills the registry, which must be running.
func makeImages(ctx context.Context, n *harness.Node) error {
	root, err := harness.SetupValue("CLOISTER_SUITES_ROOT")
	if err != nil {
		return fmt.Errorf("%w (tools/setup suites)", err)
	}
	small, err := smallImages(ctx, n)
	if err != nil {
		return err
	}
	for name, im := range small {
		if err := push(ctx, n, name, im); err != nil {
			return err
		}
	}
	files, err := writeLayer(n, "debian.tar", debianFiles())
	if err != nil {
		return err
	}
	if err := crane(ctx, n, "append", "--oci-empty-base", "-f", root, "-f", files, "-t", registry+"/"+debianBase); err != nil {
		return err
	}
	if files, err = writeLayer(n, "tools.tar", programs(small[busyboxBase])); err != nil {
		return err
	}
	if err := crane(ctx, n, "append", "-b", registry+"/"+debianBase, "-f", files, "-t", registry+"/"+toolsBase); err != nil {
		return err
	}
	for _, im := range images() {
		args := append([]string{"mutate", registry + "/" + im.base, "-t", registry + "/" + im.name, "--set-platform", "linux/amd64",
			"--env", "PATH=" + searchPath}, im.args...)
		if err := crane(ctx, n, args...); err != nil {
			return err
		}
	}
	return nil
}

// writeLayer writes the files as a layer and returns its path, which the node's clean-up removes.
func writeLayer(n *harness.Node, name string, files []harness.File) (string, error) {
	var b bytes.Buffer
	if err := harness.WriteLayer(&b, files); err != nil {
		return "", err
	}
	path := filepath.Join(n.Dir, "tmp", name)
	return path, os.WriteFile(path, b.Bytes(), 0o600)
}

// push writes the image as an OCI layout and has crane push that.
func push(ctx context.Context, n *harness.Node, name string, im *harness.Image) error {
	dir, err := os.MkdirTemp(filepath.Join(n.Dir, "tmp"), "layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var archive bytes.Buffer
	if err := im.WriteArchive(&archive); err != nil {
		return err
	}
	unpack := exec.CommandContext(ctx, "tar", "-x", "-C", dir)
	unpack.Stdin = &archive
	if out, err := unpack.CombinedOutput(); err != nil {
		return fmt.Errorf("unpacking the layout of %s: %w: %s", name, err, out)
	}
	return crane(ctx, n, "push", dir, registry+"/"+name)
}

func buildNNP(ctx context.Context, n *harness.Node) ([]byte, error) {
	path := filepath.Join(n.Dir, "tmp", "nnp")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./tools/suites/images/nnp")
	cmd.Dir = n.Artifacts().Repository
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building nnp: %w: %s", err, out)
	}
	return os.ReadFile(path)
}

// crane runs crane in the node's network namespace.
func crane(ctx context.Context, n *harness.Node, args ...string) error {
	line := append([]string{filepath.Join(n.Artifacts().Conformance, "crane"), "--insecure"}, args...)
	if out, err := n.Command(ctx, line...).CombinedOutput(); err != nil {
		return fmt.Errorf("crane %v: %w: %s", args, err, out)
	}
	return nil
}

// serveImages starts the registry and tells containerd that it stands for all. It ends with ctx, and stop waits for that.
func serveImages(ctx context.Context, n *harness.Node) (stop func(), err error) {
	hosts := filepath.Join(n.Dir, "certs.d", "_default")
	if err := os.MkdirAll(hosts, 0o755); err != nil {
		return nil, err
	}
	text := fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", registry)
	if err := os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte(text), 0o644); err != nil {
		return nil, err
	}
	blobs := filepath.Join(n.Dir, "blobs")
	if err := os.Mkdir(blobs, 0o700); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(n.Dir, "logs", "registry.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	ctx, end := context.WithCancel(ctx)
	cmd := n.Command(ctx, filepath.Join(n.Artifacts().Conformance, "crane"), "registry", "serve", "--address", registry, "--disk", blobs)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		end()
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it is killed
	}()
	stop = func() {
		end()
		<-ended
	}
	listening, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		conn, err := n.Dial(listening, "tcp", registry)
		if err == nil {
			return stop, conn.Close()
		}
		select {
		case <-listening.Done():
			stop()
			return nil, fmt.Errorf("the registry does not listen on %s: %w", registry, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
