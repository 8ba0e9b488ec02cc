// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"encoding/hex"
	"math"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// The disk's size is the host's choice: what is used of it is bounded by what the guest has memory for.
func TestCryptSectors(t *testing.T) {
	for _, c := range []struct {
		size   int64
		memory uint64
		want   uint64
	}{
		{4096, 1 << 30, 8},
		{10<<20 + 4095, 1 << 30, 10 << 20 / 512},
		{10 << 30, 1 << 30, 10 << 30 / 512},
		{10 << 30, 256 << 20, 4 << 30 / 512},
		{math.MaxInt64, 1 << 30, 16 << 30 / 512},
		{math.MaxInt64, math.MaxUint64, 2 << 40 / 512},
	} {
		got, err := cryptSectors(c.size, c.memory)
		require.NoError(t, err)
		require.Equal(t, c.want, got, "%+v", c)
	}
	for _, size := range []int64{math.MinInt64, -1, 0, 4095} {
		_, err := cryptSectors(size, 1<<30)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, size)
	}
}

func TestCryptTables(t *testing.T) {
	key := bytes.Repeat([]byte{0xab}, 64)
	text := hex.EncodeToString(key)
	require.Equal(t, "/dev/sdb 0 16 D 5 meta_device:/dev/ram0 block_size:4096 buffer_sectors:8 journal_sectors:64 "+
		"internal_hash:hmac(sha256):"+text[:64], string(integrityTable("/dev/sdb", key[:32])))
	require.Equal(t, "capi:xts(aes)-plain64 "+text+" 0 /dev/dm-0 0 1 sector_size:4096", string(cryptTable("/dev/dm-0", key)))
}

// A confidential guest writes to no disk without encryption: without a device mapper it has no place for what containers write.
func TestNoScratchDiskWithoutEncryption(t *testing.T) {
	if _, err := os.Stat("/dev/mapper/control"); err == nil {
		t.Skip("this machine has a device mapper")
	}
	s, disks := newStore(t)
	s.Confidential("sample")
	loopDisk(t, disks, "scratch", 64<<20)
	require.NoError(t, s.SetupScratch("scratch"))
	<-s.disk.ready
	require.ErrorContains(t, s.disk.err, "encrypt ")
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{scratchMount("v", 0, 0o755)})
	require.ErrorContains(t, err, "scratch disk: encrypt ")
	s.background.Wait()
}
