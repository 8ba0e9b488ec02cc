// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// File is an entry of a layer. Its type follows from what is set: Link is a symbolic link, Dir a directory, else a file
// with Body. A name like "etc/.wh.passwd" is a whiteout, as the OCI image specification has it.
type File struct {
	Name string
	Body []byte
	Link string
	Dir  bool
	// Mode are the permission bits; 0 is 0755 for directories and 0644 for files.
	Mode int64
	// UID and GID own the entry.
	UID, GID int
}

// Image is an OCI image for this machine's architecture that exists in memory only.
type Image struct {
	// Name is the full reference it is imported under.
	Name   string
	Config v1.ImageConfig
	// Layers from the lowest up; there may be none.
	Layers [][]File
}

// BusyboxImage is the name of [Busybox]'s image.
const BusyboxImage = "localhost/cloister/busybox:latest"

// Busybox is a one-layer image made from a static busybox, with its applets as links in /bin and the usual few files.
// It runs a shell unless told otherwise.
func Busybox(name, path string) (*Image, error) { return busybox(name, path, path) }

// BusyboxS390X is [Busybox] with a binary for s390x. The image's configuration names this machine's architecture all the
// same: containerd takes, and unpacks, images for its own only, and what runs the binary is not the host. This
// machine cannot run it to ask for its applets, so native, the same program for this machine, is asked.
func BusyboxS390X(name, path, native string) (*Image, error) { return busybox(name, path, native) }

func busybox(name, path, askedFor string) (*Image, error) {
	binary, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(askedFor, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", askedFor, err)
	}
	files := []File{
		{Name: "bin", Dir: true},
		{Name: "bin/busybox", Body: binary, Mode: 0o755},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, Link: "busybox"})
		}
	}
	for _, dir := range []string{"dev", "etc", "home", "proc", "root", "sys", "usr", "var"} {
		files = append(files, File{Name: dir, Dir: true})
	}
	files = append(files,
		File{Name: "tmp", Dir: true, Mode: 0o1777},
		File{Name: "usr/bin", Link: "../bin"},
		File{Name: "sbin", Link: "bin"},
		File{Name: "home/user", Dir: true, UID: 1000, GID: 1000},
		File{Name: "etc/passwd",
			Body: []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		File{Name: "etc/group", Body: []byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n")},
		File{Name: "etc/nsswitch.conf", Body: []byte("hosts: files dns\n")},
		File{Name: "etc/os-release", Body: []byte("ID=cloister-test\nPRETTY_NAME='Cloister test image'\n")},
	)
	return &Image{
		Name: name,
		Config: v1.ImageConfig{
			Env: []string{"PATH=/bin:/usr/bin:/sbin"},
			Cmd: []string{"/bin/sh"},
		},
		Layers: [][]File{files},
	}, nil
}

// Pause is Busybox as a sandbox image: its command does nothing until it is told to end.
func Pause(path string) (*Image, error) {
	im, err := Busybox(PauseImage, path)
	if err != nil {
		return nil, err
	}
	im.Config.Entrypoint = []string{"/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"}
	im.Config.Cmd = nil
	return im, nil
}

// Empty is an image without layers.
func Empty(name string) *Image {
	return &Image{Name: name, Config: v1.ImageConfig{Cmd: []string{"/nothing"}}}
}

// Deep is Busybox under further layers, so many in all. Layer number i (from 1 on) brings /layers/i with its number in
// it, replaces /top by its number, and removes /layers/gone-(i-1), which the one below brought.
func Deep(name, path string, layers int) (*Image, error) {
	im, err := Busybox(name, path)
	if err != nil {
		return nil, err
	}
	for i := 1; i < layers; i++ {
		number := fmt.Appendf(nil, "%d\n", i)
		files := []File{
			{Name: "layers", Dir: true},
			{Name: fmt.Sprintf("layers/%d", i), Body: number},
			{Name: fmt.Sprintf("layers/gone-%d", i), Body: number},
			{Name: "top", Body: number},
		}
		if i > 1 {
			files = append(files, File{Name: fmt.Sprintf("layers/.wh.gone-%d", i-1)})
		}
		im.Layers = append(im.Layers, files)
	}
	return im, nil
}

// WriteArchive writes the image as an OCI layout in a tar archive, the same bytes each time.
func (im *Image) WriteArchive(w io.Writer) error {
	out := tar.NewWriter(w)
	blobs := map[digest.Digest]bool{}
	put := func(mediaType string, data []byte) (v1.Descriptor, error) {
		d := digest.NewDigestFromBytes(digest.SHA256, sum(data))
		if !blobs[d] {
			blobs[d] = true
			if err := writeEntry(out, File{Name: "blobs/sha256/" + d.Encoded(), Body: data}); err != nil {
				return v1.Descriptor{}, err
			}
		}
		return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}, nil
	}
	putJSON := func(mediaType string, value any) (v1.Descriptor, error) {
		data, err := json.Marshal(value)
		if err != nil {
			return v1.Descriptor{}, err
		}
		return put(mediaType, data)
	}

	config := v1.Image{
		Platform: v1.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   im.Config,
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Layers: []v1.Descriptor{}}
	for _, files := range im.Layers {
		data, err := layerTar(files)
		if err != nil {
			return err
		}
		layer, err := put(v1.MediaTypeImageLayer, data)
		if err != nil {
			return err
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
		manifest.Layers = append(manifest.Layers, layer)
	}
	var err error
	if manifest.Config, err = putJSON(v1.MediaTypeImageConfig, config); err != nil {
		return err
	}
	desc, err := putJSON(v1.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	desc.Annotations = map[string]string{"io.containerd.image.name": im.Name}
	desc.Platform = &config.Platform
	index, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{desc},
	})
	if err != nil {
		return err
	}
	for _, f := range []File{
		{Name: "oci-layout", Body: []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{Name: "index.json", Body: index},
	} {
		if err := writeEntry(out, f); err != nil {
			return err
		}
	}
	return out.Close()
}

func sum(data []byte) []byte {
	s := sha256.Sum256(data)
	return s[:]
}

func layerTar(files []File) ([]byte, error) {
	var b bytes.Buffer
	err := WriteLayer(&b, files)
	return b.Bytes(), err
}

// WriteLayer writes a layer as a tar archive, the same bytes each time.
func WriteLayer(to io.Writer, files []File) error {
	w := tar.NewWriter(to)
	for _, f := range files {
		if err := writeEntry(w, f); err != nil {
			return err
		}
	}
	return w.Close()
}

func writeEntry(w *tar.Writer, f File) error {
	h := &tar.Header{
		Name: f.Name, Mode: f.Mode, Uid: f.UID, Gid: f.GID,
		ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
	}
	switch {
	case f.Dir:
		h.Typeflag, h.Name = tar.TypeDir, f.Name+"/"
	case f.Link != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Body))
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if f.Dir {
			h.Mode = 0o755
		}
	}
	if err := w.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	_, err := w.Write(f.Body)
	return err
}

// Import brings images into containerd, for CRI and for ctr alike, and waits until CRI sees them. They are not
// unpacked: whoever uses one first has it unpacked for the snapshotter that is wanted.
func (n *Node) Import(ctx context.Context, images ...*Image) error {
	for _, im := range images {
		for _, namespace := range []string{"k8s.io", n.Name} {
			if err := n.importInto(ctx, namespace, im); err != nil {
				return fmt.Errorf("importing %s into %s: %w", im.Name, namespace, err)
			}
		}
		if err := n.cri.awaitImage(ctx, im.Name); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) importInto(ctx context.Context, namespace string, im *Image) error {
	cmd := n.Ctr(ctx, "-n", namespace, "images", "import", "--no-unpack", "--local", "-")
	archive, into := io.Pipe()
	cmd.Stdin = archive
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	go func() { into.CloseWithError(im.WriteArchive(into)) }()
	err := cmd.Run()
	archive.Close() // ends WriteArchive, if ctr read less than all
	if err != nil {
		return fmt.Errorf("ctr images import: %w: %s", err, out.String())
	}
	return nil
}
