// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/test/harness"
)

// dataImage has one file of random bytes for each round, /data/0 and so on, and this program to read them.
const (
	dataImage   = "localhost/cloister/bench-data:latest"
	selfInImage = "/bin/bench"
)

func (b *bench) importData(ctx context.Context) error {
	image, err := harness.Busybox(dataImage, b.artifacts.Busybox)
	if err != nil {
		return err
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	files := []harness.File{{Name: selfInImage[1:], Body: self, Mode: 0o755}, {Name: "data", Dir: true}}
	random := rand.NewChaCha8([32]byte{}) // not to be compressed, and the same each time
	for i := range b.plan.Rounds {
		body := make([]byte, b.plan.ReadMiB<<20)
		_, _ = random.Read(body) // never fails
		files = append(files, harness.File{Name: fmt.Sprintf("data/%d", i), Body: body})
	}
	image.Layers[0] = append(image.Layers[0], files...)
	return b.node.Import(ctx, image)
}

// measureData compares a container's streams and reads with raw ones in the probe.
func (b *bench) measureData(ctx context.Context) (_ []row, err error) {
	if err := b.importData(ctx); err != nil {
		return nil, err
	}
	pod, _, err := b.runPod(ctx, harness.HandlerCloister)
	if err != nil {
		return nil, err
	}
	defer func() { remove(ctx, &err, pod) }()
	spec := idle("")
	spec.Image = dataImage
	c, _, err := runContainer(ctx, pod, spec)
	if err != nil {
		return nil, err
	}
	disk, err := b.largestImage()
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	p, err := b.startProbe(bounded, "probe", func(d *hypervisor.Document, _ *hypervisor.Resources) {
		d.Disks = []hypervisor.Disk{{ID: "disk", Path: disk, Serial: "disk", ReadOnly: true}}
	})
	if err != nil {
		return nil, fmt.Errorf("the probe: %w", err)
	}
	defer p.kill()

	var (
		out     = &samples{Name: "container", Unit: "MiB/s"}
		rawOut  = &samples{Name: "raw vsock", Unit: "MiB/s"}
		in      = &samples{Name: "container", Unit: "MiB/s"}
		rawIn   = &samples{Name: "raw vsock", Unit: "MiB/s"}
		read    = &samples{Name: "container", Unit: "MiB/s"}
		rawRead = &samples{Name: "the disk", Unit: "MiB/s"}
	)
	size := b.plan.StreamMiB << 20
	for i := range b.plan.Rounds {
		for _, m := range []struct {
			into *samples
			take func() (float64, error)
		}{
			{out, func() (float64, error) { return b.tasks.fromContainer(ctx, c.ID, b.plan.StreamMiB) }},
			{rawOut, func() (float64, error) { return p.fromGuest(ctx, size) }},
			{in, func() (float64, error) { return b.tasks.toContainer(ctx, c.ID, b.plan.StreamMiB) }},
			{rawIn, func() (float64, error) { return p.toGuest(ctx, size) }},
			{read, func() (float64, error) { return b.readFile(ctx, c, i) }},
			{rawRead, func() (float64, error) { return p.readDisk(ctx, i*b.plan.ReadMiB<<20, b.plan.ReadMiB<<20) }},
		} {
			value, err := m.take()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", m.into.Name, err)
			}
			m.into.add(value)
		}
	}
	const raw = "raw is a stream of the same vsock device to a program in the probe that writes (or reads) 64 KiB at a time; " +
		"in the container dd does so through a pipe that the agent copies, and containerd's FIFO is the other end."
	return []row{
		ratioRow("stdout throughput ÷ raw vsock", out, rawOut).budgeted(atLeast(0.9), nil).noted(raw),
		ratioRow("stdin throughput ÷ raw vsock", in, rawIn).budgeted(atLeast(0.9),
			nil).noted("as above, the other way; the time of dd's exit is in it."),
		ratioRow("block read in a container ÷ straight from the disk", read, rawRead).budgeted(atLeast(0.9), nil).
			noted("%d MiB at a time that nobody has read yet, 1 MiB a call, by the same program, the second half timed, once the first was read "+
				"for 2 s: files of the container's root (EROFS below overlayfs) and, in "+
				"the probe, the same image from /dev/sda, which is on the same kind of controller.", b.plan.ReadMiB),
	}, nil
}

// largestImage is the layer image that has the data.
func (b *bench) largestImage() (string, error) {
	var path string
	var size int64
	err := filepath.WalkDir(b.node.LayerCache, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "kernels" {
			return filepath.SkipDir
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() && info.Size() > size {
			path, size = p, info.Size()
		} else if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
	if err == nil && size < int64(b.plan.Rounds*b.plan.ReadMiB)<<20 {
		err = fmt.Errorf("the largest image in %s, %q, has %d bytes: not the data's", b.node.LayerCache, path, size)
	}
	return path, err
}

// readFile has this program read one of the data files in the container and returns the rate in MiB/s.
func (b *bench) readFile(ctx context.Context, c *harness.Container, i int) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	size := b.plan.ReadMiB << 20
	answer, err := c.Output(ctx, selfInImage, "-"+timeReadFlag, fmt.Sprintf("/data/%d", i), strconv.Itoa(size))
	if err != nil {
		return 0, err
	}
	nanos, err := strconv.ParseInt(strings.TrimSpace(answer), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the reader in the container said %q", answer)
	}
	return mibPerSecond(size/2, time.Duration(nanos)), nil
}
