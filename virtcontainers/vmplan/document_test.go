// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
)

func TestDocumentOfEachPlatform(t *testing.T) {
	for _, tc := range []struct {
		name     tee.Name
		arch     hypervisor.Architecture
		sealed   bool // an SE image is configured
		unpacked bool
		boot     string
		cpu      string
		ports    int
		with     []string
		without  []string
	}{
		{tee.None, hypervisor.ArchAMD64, false, true, "/kernel", "max", 4, nil,
			[]string{"cloister.tee=none", "swiotlb=32768", "random.trust_bootloader=off"}},
		{tee.None, hypervisor.ArchS390X, false, false, "/kernel", "max", 0, []string{"console=ttysclp0"}, nil},
		{tee.Sample, hypervisor.ArchAMD64, false, true, "/kernel", "max", 0,
			[]string{"cloister.tee=sample", "swiotlb=32768,force", "random.trust_bootloader=off"}, nil},
		{tee.Sample, hypervisor.ArchS390X, false, false, "/kernel", "max", 0, []string{"cloister.tee=sample"}, nil},
		{tee.Sample, hypervisor.ArchS390X, true, false, "/sealed", "max", 0, nil, nil},
		{tee.Sample, hypervisor.ArchAMD64, true, true, "/kernel", "max", 0, []string{"cloister.tee=sample"}, nil},
		{tee.SNP, hypervisor.ArchAMD64, false, false, "/kernel", "EPYC-v4", 0,
			[]string{"cloister.tee=snp", "swiotlb=32768", "random.trust_bootloader=off"}, nil},
		{tee.TDX, hypervisor.ArchAMD64, false, false, "/kernel", "max", 0, []string{"cloister.tee=tdx", "swiotlb=32768"}, nil},
		{tee.SE, hypervisor.ArchS390X, true, false, "/sealed", "max", 0, nil, nil},
	} {
		name := string(tc.name) + " " + string(tc.arch)
		if tc.sealed {
			name += " sealed"
		}
		t.Run(name, func(t *testing.T) {
			cfg := &configs.Config{
				Hypervisor: configs.Hypervisor{Arch: string(tc.arch), Kernel: "/kernel", Initrd: "/initrd", KernelParams: []string{"own=1"},
					Sandbox: true},
				TEE:    configs.TEE{Platform: string(tc.name), SwiotlbMiB: 64},
				Sizing: configs.Sizing{DefaultVCPUs: 2, DefaultMemoryMiB: 512, HotplugPorts: 4, FreePageReporting: true},
				State:  configs.State{Dir: "/run/cloister"},
			}
			if tc.sealed {
				cfg.TEE.SE.Image = "/sealed"
			}
			p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: cfg})
			require.Equal(t, tc.unpacked, p.unpacksKernel())
			host := Host{Accelerator: hypervisor.AccelTCG, Vsock: hypervisor.VsockVhostUser, CID: 3, Kernel: "/kernel", VhostNet: tc.sealed}
			nics := []hypervisor.NIC{{ID: "net0", MAC: "02:00:00:00:00:01", MTU: 1400}}
			doc := p.Document(nics, host)
			require.Equal(t, doc, p.Document(nics, host), "a pure function")
			require.False(t, nics[0].VhostNet, "the caller's are its own")
			require.Equal(t, tc.arch, doc.Architecture)
			require.Equal(t, tc.boot, doc.Boot.Kernel)
			require.Equal(t, !tc.name.Confidential(), doc.Memory.Reporting)
			require.Equal(t, tc.cpu, doc.CPU.Model)
			require.Equal(t, tc.ports, doc.SharedDirectories)
			require.Equal(t, []hypervisor.NIC{{ID: "net0", MAC: "02:00:00:00:00:01", MTU: 1400, VhostNet: tc.sealed}}, doc.NICs)
			require.Empty(t, doc.Disks)
			require.Nil(t, doc.Confidential, "the platform's to add")
			if require.Equal(t, tc.boot == "/sealed", doc.Boot.Sealed); doc.Boot.Sealed {
				require.Empty(t, doc.Boot.Initrd)
				require.Empty(t, doc.Boot.Parameters)
				return
			}
			require.Equal(t, "/initrd", doc.Boot.Initrd)
			require.Equal(t, "own=1", doc.Boot.Parameters[len(doc.Boot.Parameters)-1])
			for _, p := range tc.with {
				require.Contains(t, doc.Boot.Parameters, p)
			}
			for _, p := range tc.without {
				require.NotContains(t, doc.Boot.Parameters, p)
			}

			// A measured command line has nothing of the pod.
			other := testPlan(t, Pod{ID: "q", Namespace: "m", Config: cfg})
			require.Equal(t, doc.Boot, other.Document(nil, host).Boot)
		})
	}
}

func TestDocumentWithInitdata(t *testing.T) {
	d, err := initdata.Parse([]byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n"))
	require.NoError(t, err)
	p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: &configs.Config{
		Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: "snp"}, State: configs.State{Dir: "/run/cloister"},
	}})
	p.initdata = d
	doc := p.Document(nil, Host{Accelerator: hypervisor.AccelKVM})
	require.Equal(t, []hypervisor.Disk{{ID: "initdata", Path: p.StateDir() + "/initdata.img", Serial: "initdata", ReadOnly: true}}, doc.Disks)
	require.False(t, slices.ContainsFunc(doc.Boot.Parameters, func(p string) bool { return strings.HasPrefix(p, "cloister.initdata") }),
		"the measured command line is the same for all pods")
	require.Equal(t, d.Digest(), p.inputs().InitdataDigest)
}

// A scratch disk is one for every platform, and nothing of it is measured: its size is the file's alone.
func TestDocumentWithScratch(t *testing.T) {
	for _, name := range []tee.Name{tee.None, tee.Sample, tee.SNP, tee.TDX} {
		document := func(size int) *hypervisor.Document {
			p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: &configs.Config{
				Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: string(name)},
				State: configs.State{Dir: "/run/cloister"}, Scratch: configs.Scratch{Dir: "/var/scratch", SizeMiB: size},
			}})
			return p.Document(nil, Host{Accelerator: hypervisor.AccelKVM})
		}
		doc := document(64)
		require.Len(t, doc.Disks, 1, name)
		require.Equal(t, ScratchSerial, doc.Disks[0].Serial)
		require.False(t, doc.Disks[0].ReadOnly)
		require.Equal(t, "/var/scratch", filepath.Dir(doc.Disks[0].Path))
		require.Equal(t, doc, document(1<<20), name)
		require.Empty(t, document(0).Disks, name)
		require.Equal(t, doc.Boot, document(0).Boot, name)
	}
}

// Room to grow is an ordinary VM's: nothing of a confidential one's launch changes by it.
func TestDocumentWithRoom(t *testing.T) {
	for _, name := range []tee.Name{tee.None, tee.Sample, tee.SNP, tee.TDX} {
		document := func(s configs.Sizing) *hypervisor.Document {
			s.DefaultVCPUs, s.DefaultMemoryMiB = 2, 512
			p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: &configs.Config{
				Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: string(name)},
				State: configs.State{Dir: "/run/cloister"}, Sizing: s,
			}})
			require.Equal(t, Size{2, 512 << 20}, p.Size())
			return p.Document(nil, Host{Accelerator: hypervisor.AccelKVM})
		}
		without := document(configs.Sizing{})
		require.Equal(t, 2, without.CPU.Count)
		with := document(configs.Sizing{GrowVCPUs: 6, GrowMemoryMiB: 1024})
		bounded := document(configs.Sizing{GrowVCPUs: 6, GrowMemoryMiB: 1024, MaxVCPUs: 3, MaxMemoryMiB: 513})
		full := document(configs.Sizing{GrowVCPUs: 6, GrowMemoryMiB: 1024, MaxVCPUs: 2, MaxMemoryMiB: 512})
		require.Equal(t, without, full, "the maximum is what it has")
		if name.Confidential() {
			require.Equal(t, without, with)
			continue
		}
		require.Equal(t, 8, with.CPU.Count)
		require.Equal(t, append(slices.Clone(without.Boot.Parameters), "maxcpus=2"), with.Boot.Parameters)
		require.EqualValues(t, 512<<20, with.Memory.Bytes)
		require.EqualValues(t, 1536<<20, with.Memory.MaxBytes)
		require.Equal(t, 3, bounded.CPU.Count)
		require.Zero(t, bounded.Memory.MaxBytes, "less than a step more")
	}
}

func TestVsockOfAPlatform(t *testing.T) {
	both := []hypervisor.VsockKind{hypervisor.VsockVhostUser, hypervisor.VsockVhost}
	plan := func(name tee.Name, setting string) *Plan {
		return &Plan{
			cfg:    &configs.Config{Hypervisor: configs.Hypervisor{Vsock: setting}},
			driver: fakeDriver{vsock: both}, platform: fakePlatform{name: name},
		}
	}
	for _, name := range []tee.Name{tee.SNP, tee.TDX, tee.SE} {
		for setting, want := range map[string]hypervisor.VsockKind{
			configs.VsockAuto: hypervisor.VsockVhost, configs.VsockVhost: hypervisor.VsockVhost, configs.VsockVhostUser: hypervisor.VsockVhostUser,
		} {
			require.Equal(t, want, plan(name, setting).VsockKind(), "%s on %s", setting, name)
		}
	}
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		require.Equal(t, hypervisor.VsockVhostUser, plan(name, configs.VsockAuto).VsockKind(), "auto on %s", name)
	}

	// A VMM with one device has that one on every platform, and refuses the name of another.
	for setting, refused := range map[string]bool{
		"": false, configs.VsockAuto: false, configs.VsockVhost: true, configs.VsockVhostUser: true,
	} {
		p := plan(tee.SNP, setting)
		p.driver = fakeDriver{vsock: []hypervisor.VsockKind{hypervisor.VsockHybrid}}
		require.Equal(t, hypervisor.VsockHybrid, p.VsockKind())
		if err := p.checkVsock(); refused {
			require.ErrorContains(t, err, `is nothing that hypervisor.kind = "fake" has`)
		} else {
			require.NoError(t, err)
		}
	}
}

// vhost-net is taken with KVM where it is, and never insisted upon.
func TestVhostNet(t *testing.T) {
	there := filepath.Join(t.TempDir(), "vhost-net")
	require.NoError(t, os.WriteFile(there, nil, 0o600))
	for _, tc := range []struct {
		accel  hypervisor.Accelerator
		device string
		want   bool
	}{
		{hypervisor.AccelKVM, there, true}, {hypervisor.AccelKVM, there + "-not", false}, {hypervisor.AccelTCG, there, false},
	} {
		require.Equal(t, tc.want, usesVhostNet(tc.accel, tc.device), "%+v", tc)
	}
}
