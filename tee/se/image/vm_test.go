// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/internal/guesttest"
	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// The tests with a real kernel and the real boot stubs, emulated. bootTimeout is generous: a busy machine.
const (
	qemuVariable   = "CLOISTER_TEST_QEMU_S390X"
	stubsVariable  = "CLOISTER_TEST_SE_STUBS"
	kernelVariable = "CLOISTER_TEST_S390X_KERNEL"

	bootTimeout = 3 * time.Minute
)

func requireVariables(t *testing.T, names ...string) []string {
	t.Helper()
	var values []string
	for _, n := range names {
		if os.Getenv(n) == "" {
			t.Skip(n + " is not set")
		}
		values = append(values, os.Getenv(n))
	}
	return values
}

// boot starts an emulated machine with a file as its kernel and returns the console's first line that contains want. then
// may look at the machine before it ends.
func boot(t *testing.T, qemu, kernel, want string, then func(*qmp.Client)) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	socket := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.CommandContext(ctx, qemu, "-qmp", "unix:"+socket+",server=on,wait=off", "-action", "panic=pause", "-machine",
		"s390-ccw-virtio", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-nodefaults", "-no-user-config",
		"-display", "none", "-no-reboot", "-chardev", "stdio,id=con", "-device", "sclpconsole,chardev=con", "-kernel", kernel)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait()
	}()
	var console strings.Builder
	for s := bufio.NewScanner(stdout); s.Scan(); {
		if strings.Contains(s.Text(), want) {
			if then != nil {
				conn, err := net.Dial("unix", socket)
				require.NoError(t, err)
				client, err := qmp.New(ctx, conn, nil)
				require.NoError(t, err)
				defer client.Close()
				then(client)
			}
			return s.Text()
		}
		console.WriteString(s.Text() + "\n")
	}
	require.Failf(t, "the guest did not say what it should", "want %q, console:\n%s\nQEMU: %s", want, console.String(), stderr.String())
	return ""
}

// TestRealBoot is the whole way of an image without the hardware: built of the real kernel and stubs, refused by a machine
// without the facility, opened as the ultravisor does, and started where its header says, the real stage3b first.
func TestRealBoot(t *testing.T) {
	v := requireVariables(t, qemuVariable, stubsVariable, kernelVariable)
	qemu, stubs, kernel := v[0], v[1], v[2]
	dir := t.TempDir()
	host, err := hostkey.NewKey(rand.Reader)
	require.NoError(t, err)
	other, err := hostkey.NewKey(rand.Reader)
	require.NoError(t, err)
	src, err := ReadSources(kernel, guesttest.Initrd(t, "s390x", "./testdata/init"), stubs)
	require.NoError(t, err)
	img, err := Build(context.Background(), BuildConfig{
		Sources: src, Parameters: "console=ttyS0 panic=-1 quiet secret=hunter2", Initdata: []byte(testDocument),
		HostKeys: []*ecdh.PublicKey{other.PublicKey(), host.PublicKey()},
	})
	require.NoError(t, err)
	require.NotContains(t, string(img.Bytes()), "hunter2")

	t.Run("sealed", func(t *testing.T) {
		// The real stage3a looks up IPIB and header where its arguments say, and writes the header's place into the IPIB,
		// before it finds that it cannot go on: without the place in the file, what is in memory then is its work.
		b := bytes.Clone(img.Bytes())
		ipib := len(b) - len(marshalIPIB(0, 0, img.info.places))
		clear(b[ipib+120 : ipib+136])
		blank := filepath.Join(dir, "blank.img")
		require.NoError(t, os.WriteFile(blank, b, 0o600))
		boot(t, qemu, blank, "Secure unpack facility is not available", func(c *qmp.Client) {
			dump := filepath.Join(dir, "dump")
			arguments := map[string]any{"val": ipib, "size": len(b) - ipib, "filename": dump}
			require.NoError(t, c.Execute(context.Background(), "pmemsave", arguments, nil))
			got, err := os.ReadFile(dump)
			require.NoError(t, err)
			require.Equal(t, img.Bytes()[ipib:], got)
		})
	})
	u, err := open(img.Bytes(), host)
	require.NoError(t, err)
	require.True(t, bytes.Equal(src.Kernel, u.Kernel) && bytes.Equal(src.Initrd, u.Initrd))
	t.Run("opened", func(t *testing.T) {
		flat := filepath.Join(dir, "flat.img")
		f, err := os.Create(flat)
		require.NoError(t, err)
		require.NoError(t, u.WriteFlat(f))
		require.NoError(t, f.Close())
		line := boot(t, qemu, flat, "SEALED LINE: ", nil)
		require.Contains(t, line, fmt.Sprintf("SEALED LINE: %q", img.Parameters()+"\n"))
	})
	t.Run("changed", func(t *testing.T) {
		for _, c := range img.Info().Components {
			for _, at := range []uint64{c.Address, c.Address + c.Size/2, c.Address + c.Size - 1} {
				img.Bytes()[at] ^= 1
				_, err := open(img.Bytes(), host)
				require.ErrorContains(t, err, "PLD", "%s at 0x%x", c.Kind, at)
				img.Bytes()[at] ^= 1
			}
		}
		for at := img.Info().HeaderAddress; at < img.Info().HeaderAddress+uint64(img.Info().HeaderSize); at++ {
			img.Bytes()[at] ^= 1
			_, err := open(img.Bytes(), host)
			require.Error(t, err, "header at 0x%x", at)
			img.Bytes()[at] ^= 1
		}
		_, err := open(img.Bytes(), host)
		require.NoError(t, err, "all changes were undone")
	})
}
