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
	HandlerRunc     = "runc"
)

// PauseImage is the sandbox image that containerd 2.4 asks for by default.
const PauseImage = "registry.k8s.io/pause:3.10.2"

// containerdConfig keeps every path below the node's folder: what is not named here has a default outside of it.
// Version 4 is containerd 2.4's (addresses moved to io.containerd.server.v1.*).
var containerdConfig = template.Must(template.New("config.toml").Parse(`version = 4
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

[plugins]
  [plugins.'io.containerd.server.v1.grpc']
    address = '{{.Socket}}'
  [plugins.'io.containerd.server.v1.ttrpc']
    address = '{{.Socket}}.ttrpc'
  [plugins.'io.containerd.shim.v1.manager']
    # Below it, socket names of 64 characters: 106 bytes is what a unix socket's path may have.
    socket_dir = '{{.Dir}}/s'
    # For clients that cannot give a ConfigPath (nerdctl): the shim's default configuration is the node's, too.
    env = ['CLOISTER_CONFIG={{.CloisterConfig}}']
  [plugins.'io.containerd.internal.v1.opt']
    path = '{{.Dir}}/opt'
  [plugins.'io.containerd.image-verifier.v1.bindir']
    bin_dir = '{{.Dir}}/opt/image-verifier'
  [plugins.'io.containerd.nri.v1.nri']
    disable = true

  [plugins.'io.containerd.service.v1.diff-service']
    default = ['erofs', 'walking']
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
      default_runtime_name = 'runc'
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
        runtime_type = 'io.containerd.runc.v2'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
          BinaryName = '{{.Conformance}}/runc'
          Root = '{{.Dir}}/runc'
{{- range .Handlers}}
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Name}}]
        runtime_type = 'io.containerd.cloister.v2'
        runtime_path = '{{$.Shim}}'
        sandboxer = '{{.Sandboxer}}'
        snapshotter = '{{.Snapshotter}}'
        pod_annotations = ['io.cloister.*']
        privileged_without_host_devices = true
{{- if eq .Sandboxer "shim"}}
        disable_pause_image_pull = true
{{- end}}
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{{.Name}}.options]
          ConfigPath = '{{$.CloisterConfig}}'
{{- end}}
`))

// cloisterConfig points Cloister at the artifacts and keeps its state below the node's folder.
var cloisterConfig = template.Must(template.New("cloister.toml").Parse(`[hypervisor]
path = '{{.QEMU}}'
kernel = '{{.Kernel}}'
initrd = '{{.Initrd}}'
virtiofsd = '{{.Virtiofsd}}'

[rootfs]
cache_dir = '{{.LayerCache}}'

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

type handler struct{ Name, Sandboxer, Snapshotter string }

func (n *Node) writeConfig() error {
	data := struct {
		*Node
		Artifacts
		PauseImage string
		Handlers   []handler
	}{Node: n, Artifacts: n.artifacts, PauseImage: PauseImage}
	if n.Cloister {
		data.Handlers = []handler{
			{HandlerCloister, "shim", "overlayfs"},
			{HandlerErofs, "shim", "erofs"},
			{HandlerClassic, "podsandbox", "overlayfs"},
		}
	}
	for _, f := range []struct {
		path string
		tmpl *template.Template
	}{
		{n.configPath(), containerdConfig},
		{n.CloisterConfig, cloisterConfig},
		{filepath.Join(n.Dir, "cni", "10-node.conflist"), cniConfig},
		{filepath.Join(n.nerdctlNetworks(), "10-node.conflist"), cniConfig},
	} {
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

// WriteDropIn lays text over the node's cloister.toml for pods made from now on: it becomes config.d/name.toml beside it.
func (n *Node) WriteDropIn(name, text string) error {
	dir := filepath.Join(filepath.Dir(n.CloisterConfig), "config.d")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".toml"), []byte(text), 0o600)
}

// RemoveDropIn undoes WriteDropIn.
func (n *Node) RemoveDropIn(name string) error {
	return os.Remove(filepath.Join(filepath.Dir(n.CloisterConfig), "config.d", name+".toml"))
}
