// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"text/template"
)

// Names of the runtime handlers that a node has.
const (
	HandlerCloister = "cloister"
	HandlerErofs    = "cloister-erofs"
	HandlerClassic  = "cloister-classic"
	// HandlerSample has the rules of a confidential VM without its hardware: tee.platform is "sample".
	HandlerSample = "cloister-sample"
	// HandlerOptions is as HandlerSample, with the platform in containerd's options, laid over the node's cloister.toml.
	HandlerOptions = "cloister-options"
	// HandlerS390X runs pods in emulated s390x guests; their images hold s390x binaries, see [BusyboxS390X].
	HandlerS390X = "cloister-s390x"
	// HandlerSealed is HandlerS390X with the sample platform, for guests out of a sealed image, which a test names in
	// tee.se.image by [Node.WriteHandlerDropIn].
	HandlerSealed = "cloister-sealed"
	HandlerRunc   = "runc"
)

// PauseImage is the sandbox image that containerd 2.4 asks for by default.
const PauseImage = "registry.k8s.io/pause:3.10.2"

// containerdConfig keeps every path below the node's directory: what is not named here has a default outside of it.
// Version 4 is containerd 2.4's (addresses moved to io.containerd.server.v1.*); 3 is that of 2.0 and later.
var containerdConfig = template.Must(template.New("config.toml").Parse(`version = {{if .Containerd}}3{{else}}4{{end}}
root = '{{.Root}}'
state = '{{.State}}'
temp = '{{.Dir}}/tmp'
oom_score = 0
imports = []
disabled_plugins = [
  'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.devmapper', 'io.containerd.snapshotter.v1.zfs',
  'io.containerd.snapshotter.v1.btrfs', 'io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing',
]

[debug]
  level = 'debug'
{{- if .Containerd}}
[grpc]
  address = '{{.Socket}}'
[ttrpc]
  address = '{{.Socket}}.ttrpc'
{{- end}}

[plugins]
{{- if not .Containerd}}
  [plugins.'io.containerd.server.v1.grpc']
    address = '{{.Socket}}'
  [plugins.'io.containerd.server.v1.ttrpc']
    address = '{{.Socket}}.ttrpc'
{{- end}}
  [plugins.'io.containerd.shim.v1.manager']
{{- if not .Containerd}}
    # Below it, socket names of 64 characters: 106 bytes is what a unix socket's path may have.
    socket_dir = '{{.Dir}}/s'
{{- end}}
    # For clients that cannot give a ConfigPath (nerdctl): the shim's default configuration is the node's, too.
    env = ['CLOISTER_CONFIG={{.CloisterConfig}}']
  [plugins.'io.containerd.internal.v1.opt']
    path = '{{.Dir}}/opt'
  [plugins.'io.containerd.image-verifier.v1.bindir']
    bin_dir = '{{.Dir}}/opt/image-verifier'
  [plugins.'io.containerd.nri.v1.nri']
    disable = true

  [plugins.'io.containerd.service.v1.diff-service']
    default = [{{if .Erofs}}'erofs', {{end}}'walking']
  [plugins.'io.containerd.differ.v1.erofs']
    mkfs_options = ['-T0', '--mkfs-time', '--sort=none']
  [plugins.'io.containerd.transfer.v1.local']
    config_path = '{{.Dir}}/certs.d'

  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'
    [plugins.'io.containerd.cri.v1.images'.pinned_images]
      sandbox = '{{.PauseImage}}'
    [plugins.'io.containerd.cri.v1.images'.registry]
      config_path = '{{.Dir}}/certs.d'

  [plugins.'io.containerd.cri.v1.runtime']
    disable_apparmor = true
    # The machine may not let oom_score_adj be lowered (no CAP_SYS_RESOURCE).
    restrict_oom_score_adj = true
    netns_mounts_under_state_dir = true
    enable_criu = false
    cdi_spec_dirs = ['{{.Dir}}/cdi']
    [plugins.'io.containerd.cri.v1.runtime'.cni]
      bin_dirs = ['{{.Conformance}}']
      conf_dir = '{{.Dir}}/cni'

    [plugins.'io.containerd.cri.v1.runtime'.containerd]
      default_runtime_name = '{{.Default}}'
{{- if .Runc}}
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
        runtime_type = 'io.containerd.runc.v2'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
          BinaryName = '{{.Conformance}}/runc'
          Root = '{{.Dir}}/runc'
{{- end}}
{{- range .Handlers}}
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Name}}]
        runtime_type = 'io.containerd.cloister.v2'
        runtime_path = '{{$.Shim}}'
        sandboxer = '{{.Sandboxer}}'
        snapshotter = '{{.Snapshotter}}'
        pod_annotations = ['io.cloister.*', 'io.katacontainers.config.hypervisor.cc_init_data']
        privileged_without_host_devices = true
{{- if eq .Sandboxer "shim"}}
        disable_pause_image_pull = true
{{- end}}

{{- if or .ConfigPath .Options}}
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Name}}.options]
{{- if .ConfigPath}}
          ConfigPath = '{{.ConfigPath}}'
{{- end}}
{{- range .Options}}
          {{.}}
{{- end}}
{{- end}}
{{- end}}
`))

// cloisterConfig points Cloister at the artifacts and keeps its state below the node's directory.
var cloisterConfig = template.Must(template.New("cloister.toml").Parse(`[hypervisor]
path = '{{.QEMU}}'
kernel = '{{.Kernel}}'
initrd = '{{.Initrd}}'
virtiofsd = '{{.Virtiofsd}}'

[rootfs]
cache_dir = '{{.LayerCache}}'

[scratch]
dir = '{{.Dir}}/scratch'

[state]
dir = '{{.CloisterState}}'

[log]
level = 'debug'
`))

// cniConfig is the pods' network. Every node has its own network namespace, so all can have the same subnets.
var cniConfig = template.Must(template.New("10-node.conflist").Parse(`{
  "cniVersion": "1.0.0",
  "name": "{{.Name}}",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "{{.Name}}",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "{{.Dir}}/ipam",
        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`))

// Drop-ins of the handlers that have a configuration of their own.
const (
	sampleDropIn = `[tee]
platform = 'sample'
`
	// Emulating another architecture takes its time, more so on a machine that does much else.
	s390xDropIn = `[hypervisor]
arch = 's390x'
path = '{{.QEMUS390X}}'
kernel = '{{.KernelS390X}}'
initrd = '{{.InitrdS390X}}'
# The shim's own device, on zPCI, also where the host has /dev/vhost-vsock.
vsock = 'vhost-user'

[timeouts]
boot = '240s'
`
)

// handler is a runtime handler of containerd's configuration.
type handler struct {
	Name, Sandboxer, Snapshotter string
	// ConfigPath is the handler's cloister.toml; empty: the node's, with Options laid over it.
	ConfigPath string
	Options    []string
	// dropIn is a template of what is laid over it, for a handler with a configuration of its own.
	dropIn string
}

// handlers lists Cloister's handlers. Those without a ConfigPath share the node's cloister.toml, which the shim finds by its
// environment; each other one has its own. Handlers with options are for some pods only: containerd's CRI takes them for runc's where a
// pod has a user namespace and, before 2.4, where the handler has a sandboxer of its own.
func (n *Node) handlers() []handler {
	own := func(name, dropIn string) handler {
		return handler{Name: name, Sandboxer: "shim", Snapshotter: "overlayfs", ConfigPath: n.handlerConfig(name), dropIn: dropIn}
	}
	return []handler{
		{Name: HandlerCloister, Sandboxer: "shim", Snapshotter: "overlayfs"},
		{Name: HandlerErofs, Sandboxer: "shim", Snapshotter: "erofs"},
		{Name: HandlerClassic, Sandboxer: "podsandbox", Snapshotter: "overlayfs"},
		// As configs/containerd-config.toml has it.
		{Name: HandlerOptions, Sandboxer: "shim", Snapshotter: "overlayfs", Options: []string{
			"tee.platform = 'sample'",
			"annotations.allowed = ['io.cloister.initdata', 'io.katacontainers.config.hypervisor.cc_init_data']",
		}},
		own(HandlerSample, sampleDropIn),
		own(HandlerS390X, s390xDropIn),
		own(HandlerSealed, s390xDropIn+"\n"+sampleDropIn),
	}
}

func (n *Node) handlerConfig(name string) string { return filepath.Join(n.Dir, name, "cloister.toml") }

func (n *Node) writeConfig() error {
	data := struct {
		*Node
		Artifacts
		PauseImage, Default string
		Runc, Erofs         bool
		Handlers            []handler
	}{
		Node: n, Artifacts: n.artifacts, PauseImage: PauseImage, Default: HandlerRunc,
		Runc: serves(n.Handlers, HandlerRunc), Erofs: serves(n.Handlers, HandlerErofs),
	}
	if len(n.Handlers) > 0 {
		data.Default = n.Handlers[0]
	}
	for _, h := range n.handlers() {
		if serves(n.Handlers, h.Name) {
			data.Handlers = append(data.Handlers, h)
		}
	}
	type file struct {
		path string
		tmpl *template.Template
	}
	files := []file{
		{n.configPath(), containerdConfig},
		{n.CloisterConfig, cloisterConfig},
		{filepath.Join(n.Dir, "cni", "10-node.conflist"), cniConfig},
		{filepath.Join(n.nerdctlNetworks(), "10-node.conflist"), cniConfig},
	}
	for _, h := range data.Handlers {
		if h.dropIn != "" {
			files = append(files, file{h.ConfigPath, cloisterConfig},
				file{dropInPath(h.ConfigPath, "10-handler"), template.Must(template.New(h.Name).Parse(h.dropIn))})
		}
	}
	for _, f := range files {
		var b bytes.Buffer
		if err := f.tmpl.Execute(&b, data); err != nil {
			return fmt.Errorf("making %s: %w", f.path, err)
		}
		if err := os.MkdirAll(filepath.Dir(f.path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(f.path, b.Bytes(), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func dropInPath(config, name string) string {
	return filepath.Join(filepath.Dir(config), "config.d", name+".toml")
}

func writeDropIn(config, name, text string) error {
	path := dropInPath(config, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o600)
}

// WriteDropIn lays text over the node's cloister.toml for pods made from now on: it becomes config.d/name.toml beside
// it. Handlers with a configuration of their own do not see it, see [Node.WriteHandlerDropIn].
func (n *Node) WriteDropIn(name, text string) error { return writeDropIn(n.CloisterConfig, name, text) }

// RemoveDropIn undoes WriteDropIn.
func (n *Node) RemoveDropIn(name string) error { return os.Remove(dropInPath(n.CloisterConfig, name)) }

// WriteHandlerDropIn is WriteDropIn for one of [HandlerSample], [HandlerS390X] and [HandlerSealed].
func (n *Node) WriteHandlerDropIn(handler, name, text string) error {
	return writeDropIn(n.handlerConfig(handler), name, text)
}

// RemoveHandlerDropIn undoes WriteHandlerDropIn.
func (n *Node) RemoveHandlerDropIn(handler, name string) error {
	return os.Remove(dropInPath(n.handlerConfig(handler), name))
}
