// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// measureVsock compares the embedded vsock device with the kernel's vhost-vsock: streams and round trips to two probes that
// differ in nothing else.
func (b *bench) measureVsock(ctx context.Context) ([]row, error) {
	bounded, cancel := context.WithTimeout(ctx, stepBudget)
	defer cancel()
	// Nobody listens: any port does that is the guest's alone.
	kernel, err := vsock.NewKernel(bounded, func(cid uint32) uint32 { return cid })
	if errdefs.IsUnavailable(err) {
		fmt.Printf("    left out: %v\n", err)
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	beside, err := b.startProbe(bounded, "kernel-vsock", func(d *hypervisor.Document, r *hypervisor.Resources) {
		d.Vsock, r.Vsock = hypervisor.Vsock{Kind: hypervisor.VsockVhost, CID: kernel.CID()}, kernel
	})
	if err != nil {
		return nil, fmt.Errorf("the probe with the kernel's device: %w", err)
	}
	defer beside.kill()
	ours, err := b.startProbe(bounded, "embedded-vsock", func(*hypervisor.Document, *hypervisor.Resources) {})
	if err != nil {
		return nil, fmt.Errorf("the probe with the embedded device: %w", err)
	}
	defer ours.kill()

	size := b.plan.StreamMiB << 20
	var rows []row
	for _, m := range []struct {
		name, unit string
		take       func(*probe) (float64, error)
	}{
		{"guest to host", "MiB/s", func(p *probe) (float64, error) { return p.fromGuest(bounded, size) }},
		{"host to guest", "MiB/s", func(p *probe) (float64, error) { return p.toGuest(bounded, size) }},
		{fmt.Sprintf("round trip of %d bytes", messageSize), "µs",
			func(p *probe) (float64, error) { return p.roundTrip(bounded, b.plan.RoundTrips) }},
	} {
		embedded, vhost := &samples{Name: "embedded", Unit: m.unit}, &samples{Name: "vhost-vsock", Unit: m.unit}
		for range b.plan.Rounds {
			for _, of := range []struct {
				probe *probe
				into  *samples
			}{{ours, embedded}, {beside, vhost}} {
				value, err := m.take(of.probe)
				if err != nil {
					return rows, fmt.Errorf("%s, %s: %w", m.name, of.into.Name, err)
				}
				of.into.add(value)
			}
		}
		rows = append(rows, ratioRow("embedded vsock device ÷ vhost-vsock, "+m.name, embedded, vhost).
			noted("raw vsock between a program in the probe and one on the host; streams go 64 KiB at a time."))
	}
	return rows, nil
}
