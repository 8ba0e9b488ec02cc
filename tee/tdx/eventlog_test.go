// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/qemu/fwcfg"
	"github.com/cloister-project/cloister/internal/guesttest"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/snp"
)

// Firmware with a TPM takes the same events as firmware in a TD (TCG PC Client Platform Firmware Profile), with SHA-384
// too; registers stand for PCRs. So a real firmware and a real kernel under emulation, with a software TPM, tell what they
// measure, and that is compared with what is predicted. What only a TD has (hand-off block, configuration volume) is not
// among it, and nothing of this says that a TD was started.

// tcgEvent is an entry of the log.
type tcgEvent struct {
	pcr, kind uint32
	digest    Digest // SHA-384
	data      []byte
}

const (
	tcgAlgSHA384            = 12
	evSeparator             = 4
	evEventTag              = 6
	evPlatformConfigFlags   = 0xa
	evVariableDriverConfig  = 0x80000001
	evVariableBoot          = 0x80000002
	evBootServicesApp       = 0x80000003
	evAction                = 0x80000007
	pcrSecureBoot, pcrLinux = 7, 9
)

// parseLog reads a log in the "crypto agile" format.
func parseLog(t *testing.T, b []byte) (out []tcgEvent) {
	t.Helper()
	le := binary.LittleEndian
	sizes := map[uint16]int{4: 20, 11: 32, 12: 48, 13: 64}
	take := func(n int) []byte {
		require.GreaterOrEqual(t, len(b), n, "the log is cut off")
		head := b[:n]
		b = b[n:]
		return head
	}
	take(28) // the first entry is of the old format
	take(int(le.Uint32(take(4))))
	for len(b) > 0 {
		e := tcgEvent{pcr: le.Uint32(take(4)), kind: le.Uint32(take(4))}
		for range le.Uint32(take(4)) {
			alg := le.Uint16(take(2))
			require.Contains(t, sizes, alg)
			if digest := take(sizes[alg]); alg == tcgAlgSHA384 {
				copy(e.digest[:], digest)
			}
		}
		e.data = take(int(le.Uint32(take(4))))
		out = append(out, e)
	}
	return out
}

// startTPM runs a software TPM and returns the other end of its control channel.
func startTPM(t *testing.T, ctx context.Context, swtpm string) *os.File {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	ours, theirs := os.NewFile(uintptr(fds[0]), "tpm"), os.NewFile(uintptr(fds[1]), "tpm")
	cmd := exec.CommandContext(ctx, swtpm, "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(),
		"--ctrl", "type=unixio,clientfd=3", "--flags", "not-need-init,startup-clear")
	cmd.ExtraFiles = []*os.File{theirs}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	theirs.Close()
	t.Cleanup(func() {
		ours.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("swtpm: %s", out.String())
		}
	})
	return ours
}

// firmwareTimeout is generous: emulation on a busy machine.
const firmwareTimeout = 120 * time.Second

func testQEMU(t *testing.T) string {
	t.Helper()
	name := os.Getenv("CLOISTER_TEST_QEMU")
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	return path
}

// measuredBoot is a machine with a software TPM that boots the kernel to testdata/eventlog.
type measuredBoot struct {
	qemu, swtpm, firmware, kernel, initrd string
	parameters                            string
	more                                  []string
}

func (m measuredBoot) args(tpmFD uintptr, serial string) []string {
	return append([]string{
		"-nodefaults", "-no-user-config", "-machine", "q35,smm=off", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-bios", m.firmware,
		"-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", tpmFD), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-serial", serial, "-kernel", m.kernel, "-initrd", m.initrd, "-append", m.parameters,
	}, m.more...)
}

func (m measuredBoot) run(t *testing.T, ctx context.Context) []tcgEvent {
	t.Helper()
	console := filepath.Join(t.TempDir(), "console")
	cmd := exec.CommandContext(ctx, m.qemu, append(m.args(3, "file:"+console), "-no-reboot", "-display", "none")...)
	cmd.ExtraFiles = []*os.File{startTPM(t, ctx, m.swtpm)}
	out, err := cmd.CombinedOutput()
	printed, _ := os.ReadFile(console)
	require.NoError(t, err, "%s\n%s", out, printed)
	require.Contains(t, string(printed), "eventlog complete")
	var raw []byte
	for line := range strings.Lines(string(printed)) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "eventlog "); ok && text != "complete" {
			b, err := hex.DecodeString(text)
			require.NoError(t, err)
			raw = append(raw, b...)
		}
	}
	return parseLog(t, raw)
}

func TestFirmwareMeasuresWhatIsPredicted(t *testing.T) {
	m := measuredBoot{
		qemu: testQEMU(t), kernel: fileFromEnv(t, "CLOISTER_TEST_KERNEL"), swtpm: os.Getenv("CLOISTER_TEST_SWTPM"),
		parameters: "console=ttyS0 panic=-1 loglevel=4",
	}
	if m.swtpm == "" {
		m.swtpm = "swtpm"
	}
	var err error
	if m.swtpm, err = exec.LookPath(m.swtpm); err != nil {
		t.Skipf("no software TPM: %v", err)
	}
	m.initrd = guesttest.Initrd(t, "amd64", "./testdata/eventlog")
	kernel, err := os.ReadFile(m.kernel)
	require.NoError(t, err)
	initrd, err := os.ReadFile(m.initrd)
	require.NoError(t, err)
	of := func(events []Event) (out []Digest) {
		for _, e := range events {
			out = append(out, e.Digest)
		}
		return out
	}

	// The third checks the hashes of what it boots and has to find them in memory.
	for _, variable := range []string{"CLOISTER_TEST_OVMF", "CLOISTER_TEST_OVMF_TDX", "CLOISTER_TEST_OVMF_AMDSEV"} {
		t.Run(variable, func(t *testing.T) {
			m := m
			m.firmware = fileFromEnv(t, variable)
			fw, err := os.ReadFile(m.firmware)
			require.NoError(t, err)
			prof, err := readProfile(fw)
			require.NoError(t, err)
			if variable == "CLOISTER_TEST_OVMF_AMDSEV" {
				m.more = kernelHashes(t, fw, kernel, initrd, m.parameters)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*firmwareTimeout)
			defer cancel()
			log := m.run(t, ctx)
			digests := func(pick func(e tcgEvent) bool) (out []Digest) {
				for _, e := range log {
					if pick(e) {
						out = append(out, e.digest)
					}
				}
				return out
			}

			started := digests(func(e tcgEvent) bool { return e.kind == evBootServicesApp })
			one, err := rtmr1(prof, kernel)
			if !prof.wholeKernel {
				require.ErrorIs(t, err, errdefs.ErrNotImplemented)
				one, err = rtmr1(profile{wholeKernel: true}, kernel)
				require.NotEqual(t, of(one[:1]), started, "QEMU did not change the header: the reason to leave RTMR1 out is gone")
			} else {
				require.Equal(t, of(one[:1]), started, "the kernel's PE hash")
			}
			require.NoError(t, err)
			require.Equal(t, []Digest{one[1].Digest, one[3].Digest, one[4].Digest}, digests(func(e tcgEvent) bool { return e.kind == evAction }),
				"the boot's steps")
			two, err := rtmr2(prof, m.parameters, initrd)
			require.NoError(t, err)
			require.Equal(t, of(two), digests(func(e tcgEvent) bool { return e.kind == evEventTag && e.pcr == pcrLinux }), "parameters and initrd")
			variables, want := digests(func(e tcgEvent) bool { return e.pcr == pcrSecureBoot }), of(append(secureBootVariables(), separator()))
			if prof.secureBoot {
				require.NotEqual(t, want[0], variables[0], "the reason to leave RTMR0 out is gone")
				want, variables = want[1:], variables[1:]
			}
			require.Equal(t, want, variables, "Secure Boot's variables")
			if prof.initrd != initrdBehind {
				return // what follows differs in newer builds, and is not predicted of them
			}
			require.Equal(t, of(bootOptions()), digests(func(e tcgEvent) bool { return e.kind == evVariableBoot }), "boot options")
			if !prof.acpi {
				return
			}
			// The same machine once more, for the tables alone. Of the TPM's own log area there is a blob more.
			again, err := unix.FcntlInt(startTPM(t, ctx, m.swtpm).Fd(), unix.F_DUPFD, 100) // inherited, at a number of its own
			require.NoError(t, err)
			defer unix.Close(again)
			acpi, err := fwcfg.ACPITables(ctx, m.qemu, m.args(uintptr(again), "null")...)
			require.NoError(t, err)
			measured := digests(func(e tcgEvent) bool { return e.kind == evPlatformConfigFlags })
			require.Len(t, measured, 4)
			require.Equal(t, of((*ACPI)(acpi).events()), []Digest{measured[0], measured[1], measured[3]}, "ACPI blobs")
		})
	}
}

// kernelHashes are the arguments that put the hash table where the firmware looks for it.
func kernelHashes(t *testing.T, fw, kernel, initrd []byte, parameters string) []string {
	t.Helper()
	parsed, err := firmware.Parse(fw)
	require.NoError(t, err)
	require.NotNil(t, parsed.HashTable)
	table := snp.Hashes{Parameters: snp.HashParameters(parameters), Initrd: sha256.Sum256(initrd), Kernel: sha256.Sum256(kernel)}.Table()
	path := filepath.Join(t.TempDir(), "hashes")
	require.NoError(t, os.WriteFile(path, table[:], 0o644))
	return []string{"-device", fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", path, parsed.HashTable.Base)}
}
