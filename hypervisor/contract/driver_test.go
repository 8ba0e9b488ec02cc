// SPDX-License-Identifier: Apache-2.0

package contract

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmm"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

// What needs no binary: every VMM, wherever the tests run.
func TestDriverWithoutBinary(t *testing.T) {
	for _, kind := range vmm.Kinds() {
		t.Run(kind, func(t *testing.T) {
			driver := func(path string) hypervisor.Driver {
				d, err := vmm.New(vmm.Config{Kind: kind, Path: path, Arch: hypervisor.ArchAMD64})
				require.NoError(t, err)
				return d
			}
			d := driver("/nonexistent/vmm")
			require.Equal(t, kind, d.Kind())
			require.NotEmpty(t, d.VsockKinds())
			for _, p := range d.KernelParameters(hypervisor.AccelKVM) {
				require.Len(t, strings.Fields(p), 1, "%q", p)
			}
			doc := vmtest.Document(d, hypervisor.AccelKVM, "/nonexistent/kernel", "/nonexistent/initrd", "idle")
			require.NoError(t, d.Validate(doc), "it looks at no file")
			doc.ID, doc.UUID = "../x", "y"
			err := d.Validate(doc)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, "id ")
			require.ErrorContains(t, err, "uuid")

			for path, want := range map[string]error{
				"/nonexistent/vmm": os.ErrNotExist, "/etc/passwd": errdefs.ErrInvalidArgument, "/bin/true": nil,
			} {
				d := driver(path)
				_, err := d.Capabilities(context.Background())
				require.ErrorContains(t, err, "hypervisor.path", path)
				if want != nil {
					require.ErrorIs(t, err, want, path)
				}
				_, again := d.Accelerator(context.Background(), hypervisor.AccelAuto)
				require.EqualError(t, again, err.Error(), "every method says the same")
			}
		})
	}
}

func TestDriver(t *testing.T) {
	m, ctx := newMachine(t), context.Background()
	binary, err := m.Binary()
	require.NoError(t, err)
	c, err := m.Capabilities(ctx)
	require.NoError(t, err)
	require.Equal(t, binary, c.Binary)
	require.NotEmpty(t, c.Version)
	_, err = m.Accelerator(ctx, "abacus")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	check := nothingLeft(t)
	doc := vmtest.Document(m, m.accel, "/nonexistent/kernel", "/nonexistent/initrd", "idle")
	first, err := m.Describe(ctx, doc)
	require.NoError(t, err, "it opens no file")
	require.Equal(t, binary, first.Binary)
	second, err := m.Describe(ctx, doc)
	require.NoError(t, err)
	require.Equal(t, first, second)
	doc.CPU.Count = 0
	_, err = m.Describe(ctx, doc)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	check()
}
