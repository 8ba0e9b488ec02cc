// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40
)

// someOptions are zeroed, with quota.
var someOptions = Options{
	UUID: [16]byte{1, 2, 3, 0xfe}, HashSeed: [16]byte{7, 8}, Label: "scratch", Now: time.Unix(1_700_000_000, 5), Zeroed: true,
	ProjectQuota: true,
}

func with(change func(o *Options)) Options {
	o := someOptions
	change(&o)
	return o
}

// device records what is written to it and refuses what no device would take, or what was written before.
type device struct {
	io.WriterAt
	size   int64
	pieces []extent // bytes
	bytes  int64
}

func (d *device) WriteAt(b []byte, at int64) (int, error) {
	piece := extent{at, int64(len(b))}
	if at < 0 || piece.end() > d.size || at%blockSize != 0 || len(b)%blockSize != 0 || len(b) == 0 {
		return 0, fmt.Errorf("write %d bytes at %d of %d", len(b), at, d.size)
	}
	for _, p := range d.pieces {
		if p.first < piece.end() && piece.first < p.end() {
			return 0, fmt.Errorf("%v is written twice: %v", p, piece)
		}
	}
	d.pieces = append(d.pieces, piece)
	d.bytes += piece.blocks
	if d.WriterAt == nil {
		return len(b), nil
	}
	return d.WriterAt.WriteAt(b, at)
}

// format makes an image in a sparse file of the test and returns its path.
func format(t *testing.T, size int64, o Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	if err := f.Truncate(size); errors.Is(err, syscall.EFBIG) || errors.Is(err, syscall.EINVAL) {
		t.Skipf("no files of %d bytes in %s: %v", size, filepath.Dir(path), err)
	} else {
		require.NoError(t, err)
	}
	if !o.Zeroed {
		fill(t, f, size)
	}
	require.NoError(t, Format(&device{WriterAt: f, size: size}, size, o))
	require.NoError(t, f.Close())
	return path
}

// fill makes a device one on which something was.
func fill(t *testing.T, f *os.File, size int64) {
	t.Helper()
	garbage := slices.Repeat([]byte{0xff}, mib)
	for at := int64(0); at < size; at += mib {
		_, err := f.WriteAt(garbage[:min(mib, size-at)], at)
		require.NoError(t, err)
	}
}

// tool returns what a program of e2fsprogs prints.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", name)); err != nil {
			t.Skipf("no %s (e2fsprogs): %v", name, err)
		}
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%v\n%s", args, out)
	return string(out)
}

// check has e2fsck look for faults. It prints passes and a summary if there are none.
func check(t *testing.T, path string) {
	t.Helper()
	out := tool(t, "e2fsck", "-fn", path)
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if !(strings.HasPrefix(line, "e2fsck ") || strings.HasPrefix(line, "Pass ") || strings.Contains(line, " files (") || line == "") {
			t.Fatalf("e2fsck says %q:\n%s", line, out)
		}
	}
}

func TestCleanForE2fsck(t *testing.T) {
	const groupBytes = blocksPerGroup * blockSize
	dirty := func(o *Options) { o.Zeroed = false }
	for name, test := range map[string]struct {
		size int64
		o    Options
	}{
		"smallest":           {MinSize, someOptions},
		"smallest, dirty":    {MinSize, with(dirty)},
		"4 MiB":              {4 * mib, someOptions},
		"4 MiB, dirty":       {4 * mib, with(dirty)},
		"64 MiB":             {64 * mib, someOptions},
		"64 MiB, dirty":      {64 * mib, with(dirty)},
		"127 MiB and 3":      {127*mib + 3*blockSize, someOptions},
		"a block less":       {groupBytes - blockSize, someOptions},
		"128 MiB":            {groupBytes, someOptions},
		"a block more":       {groupBytes + blockSize, someOptions},
		"129 MiB":            {129 * mib, someOptions},
		"two groups, dirty":  {133 * mib, with(dirty)},
		"odd last group":     {5*groupBytes + 77*mib + blockSize, someOptions},
		"copy in last group": {9*groupBytes + 17*mib, someOptions},
		"1 GiB":              {gib, someOptions},
		"1 GiB, no quota":    {gib, with(func(o *Options) { o.ProjectQuota = false })},
		"10 GiB":             {10 * gib, someOptions},
		"few inodes":         {10 * gib, with(func(o *Options) { o.InodeRatio = maxInodeRatio })},
		"many inodes":        {10 * gib, with(func(o *Options) { o.InodeRatio = minInodeRatio })},
		"bare options":       {gib, Options{UUID: [16]byte{1}, Zeroed: true}},
		"owner and mode": {gib, with(func(o *Options) {
			o.RootUID, o.RootGID, o.RootMode = 1_000_000, 2_000_000, 0o7777
		})},
		"1 TiB": {tib, someOptions},
	} {
		t.Run(name, func(t *testing.T) { check(t, format(t, test.size, test.o)) })
	}
}

// A device of the largest size has one block more than can be counted, and so much than files of ext4 can have.
func TestLargest(t *testing.T) {
	d := &device{size: MaxSize}
	require.NoError(t, Format(d, MaxSize, with(func(o *Options) { o.InodeRatio = minInodeRatio })))
	path := format(t, MaxSize-blockSize, with(func(o *Options) { o.InodeRatio = mib }))
	require.Equal(t, "4294967295", header(t, path)["Block count"])
	check(t, path)
}

var mke2fsSays = regexp.MustCompile(`with (\d+) 4k blocks and (\d+) inodes`)

// TestCountsAsMke2fs compares what is at the end of the device, where a small last group is dropped, and inodes.
func TestCountsAsMke2fs(t *testing.T) {
	const group = blocksPerGroup
	for _, blocks := range []int64{
		256, 1024, group - 1, group, group + 1, group + 2 + 2 + 259 + 49, group + 2 + 2 + 259 + 50,
		2*group + 2 + 344 + 49, 2*group + 2 + 344 + 50, 3*group - 1, 3*group + 400, 10 * group, 81*group + 12345,
		800 * group, 8192*group + 500, 8192*group + 600,
	} {
		for _, ratio := range []int64{defaultInodeRatio, 40_000, 400_000} {
			path := filepath.Join(t.TempDir(), "disk")
			require.NoError(t, os.WriteFile(path, nil, 0o600))
			require.NoError(t, os.Truncate(path, blocks*blockSize))
			out := tool(t, "mke2fs", "-n", "-t", "ext4", "-b", "4096", "-I", "256", "-i", strconv.FormatInt(ratio, 10), "-O",
				"^has_journal,^resize_inode,^64bit", path)
			l := newLayout(blocks*blockSize, Options{InodeRatio: ratio})
			said := mke2fsSays.FindStringSubmatch(out)
			require.Len(t, said, 3, out)
			require.Equal(t, said[1], strconv.FormatInt(l.blocks, 10), "%d blocks, ratio %d", blocks, ratio)
			if l.blocks == blocks { // it does not count again for a file system without the last group
				require.Equal(t, said[2], strconv.FormatInt(l.groups*l.inodesPerGroup, 10), "%d blocks, ratio %d", blocks, ratio)
			}
		}
	}
}

// header is what dumpe2fs says of the superblock.
func header(t *testing.T, path string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for line := range strings.Lines(tool(t, "dumpe2fs", "-h", path)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			out[name] = strings.TrimSpace(value)
		}
	}
	return out
}

func TestSuperblock(t *testing.T) {
	h := header(t, format(t, gib, someOptions))
	features := strings.Fields(h["Filesystem features"])
	require.ElementsMatch(t, []string{
		"ext_attr", "dir_index", "filetype", "extent", "flex_bg", "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize",
		"metadata_csum", "quota", "project",
	}, features)
	for name, value := range map[string]string{
		"Filesystem volume name": "scratch", "Filesystem UUID": "010203fe-0000-0000-0000-000000000000",
		"Directory Hash Seed": "07080000-0000-0000-0000-000000000000", "Filesystem flags": "signed_directory_hash",
		"Filesystem state": "clean", "Errors behavior": "Remount read-only", "Inode count": "65536", "Free inodes": "65524",
		"Block count": "262144", "Reserved block count": "0", "Block size": "4096", "Inode size": "256", "Maximum mount count": "-1",
		"Filesystem created": "Tue Nov 14 22:13:20 2023", "Required extra isize": "32", "Project quota inode": "12",
		"Overhead clusters": strconv.Itoa(8*(2+512) + 5*2), "Checksum type": "crc32c",
	} {
		require.Equal(t, value, h[name], name)
	}

	h = header(t, format(t, gib, with(func(o *Options) { o.ProjectQuota = false })))
	require.NotContains(t, h["Filesystem features"], "quota")
	require.NotContains(t, h["Filesystem features"], "project")
	require.NotContains(t, h, "Project quota inode")
	require.Equal(t, "65525", h["Free inodes"])
}

func TestRootDirectory(t *testing.T) {
	path := format(t, gib, with(func(o *Options) {
		o.RootMode, o.RootUID, o.RootGID = 0o1777, 70_000, 80_000
		o.Now = time.Date(2100, time.February, 1, 2, 3, 4, 0, time.UTC)
	}))
	words := strings.Join(strings.Fields(tool(t, "debugfs", "-R", "stat <2>", path)), " ")
	for _, want := range []string{"Mode: 01777", "User: 70000 Group: 80000", "Mon Feb 1 02:03:04 2100", "Links: 3"} {
		require.Contains(t, words, want)
	}
	require.Contains(t, tool(t, "debugfs", "-R", "ls -l", path), "lost+found")
}

func TestQuotaFile(t *testing.T) {
	out := tool(t, "debugfs", "-R", "get_quota project 0", format(t, gib, someOptions))
	lines := strings.Split(strings.TrimSpace(out), "\n")
	require.Equal(t, []string{"0", "20480", "0", "0", "2", "0", "0"}, strings.Fields(lines[len(lines)-1]), out)
}

// TestInodeTablesAreLeft checks what tells the kernel whether it has to write inode tables.
func TestInodeTablesAreLeft(t *testing.T) {
	for _, zeroed := range []bool{true, false} {
		out := tool(t, "dumpe2fs", format(t, 300*mib, with(func(o *Options) { o.Zeroed = zeroed })))
		require.Equal(t, 3, strings.Count(out, "\nGroup "))
		require.Equal(t, zeroed, strings.Count(out, "ITABLE_ZEROED") == 3, out)
		require.Equal(t, zeroed, strings.Contains(out, "ITABLE_ZEROED"), out)
		require.Equal(t, 2, strings.Count(out, "INODE_UNINIT"))
		require.Equal(t, 1, strings.Count(out, "BLOCK_UNINIT"))
	}
}

// TestLittleIsWritten bounds bytes and pieces; a device that needs its inode tables zeroed gets no more than one that
// does not.
func TestLittleIsWritten(t *testing.T) {
	for name, test := range map[string]struct{ size, bytes, pieces int64 }{
		"1 MiB":   {mib, 64 << 10, 10},
		"1 GiB":   {gib, 128 << 10, 20},
		"10 GiB":  {10 * gib, 256 << 10, 25},
		"100 GiB": {100 * gib, 768 << 10, 50},
		"1 TiB":   {tib, 7 * mib, 200},
	} {
		t.Run(name, func(t *testing.T) {
			for _, zeroed := range []bool{true, false} {
				d := &device{size: test.size}
				require.NoError(t, Format(d, test.size, with(func(o *Options) { o.Zeroed = zeroed })))
				t.Logf("%d bytes in %d pieces", d.bytes, len(d.pieces))
				require.Less(t, d.bytes, test.bytes)
				require.Less(t, int64(len(d.pieces)), test.pieces)
			}
		})
	}
}

func TestSameOptionsSameBytes(t *testing.T) {
	read := func(o Options) []byte {
		b, err := os.ReadFile(format(t, 16*mib, o))
		require.NoError(t, err)
		return b
	}
	require.Equal(t, read(someOptions), read(someOptions))
	require.NotEqual(t, read(someOptions), read(with(func(o *Options) { o.UUID[15] = 1 })))
}

// TestLayout checks what no two users of blocks may do, for many sizes.
func TestLayout(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		size := int64(math.Exp2(20+21*random.Float64())) &^ (blockSize - 1)
		ratio := int64(math.Exp2(12 + 14*random.Float64()))
		l := newLayout(size, Options{InodeRatio: ratio, ProjectQuota: true})
		require.LessOrEqual(t, l.blocks*blockSize, size)
		require.LessOrEqual(t, l.groups*l.inodesPerGroup, int64(math.MaxUint32))
		require.GreaterOrEqual(t, l.inodesPerGroup, int64(inodesPerBlock))
		if l.groups*l.inodesPerGroup < size/ratio-l.groups*inodesPerBlock {
			t.Fatalf("%d inodes for %d bytes at %d", l.groups*l.inodesPerGroup, size, ratio)
		}

		all := []extent{l.root, l.lostFound, l.quota}
		for g := range l.groups {
			all = append(all, extent{g * blocksPerGroup, l.superBlocks(g)}, extent{l.blockBitmaps[g], 1}, extent{l.inodeBitmaps[g], 1},
				extent{l.tables[g], l.tableBlocks})
		}
		all = slices.DeleteFunc(all, func(e extent) bool { return e.blocks == 0 })
		slices.SortFunc(all, func(a, b extent) int { return int(a.first - b.first) })
		sum := int64(0)
		for i, e := range all {
			if i > 0 && all[i-1].end() > e.first || e.end() > l.blocks {
				t.Fatalf("%d bytes: %v and %v of %d blocks", size, all[max(i-1, 0)], e, l.blocks)
			}
			sum += e.blocks
		}
		// Each superblock in the way costs less than a table, nothing else does.
		holes := l.next - l.superBlocks(0)
		for _, u := range l.used {
			holes -= u.blocks
		}
		for g := int64(1); g*blocksPerGroup < l.next; g++ {
			if hasSuper(g) {
				holes -= l.superBlocks(g) + l.tableBlocks
			}
		}
		require.LessOrEqual(t, holes, int64(0))
		used := l.overhead + rootBlocks + lostFoundBlocks + quotaBlocks
		require.Equal(t, used, sum)
		for g := range l.groups {
			used -= l.superBlocks(g)
			for _, u := range l.usedIn(g) {
				used -= u.blocks
			}
		}
		require.Zero(t, used, "blocks in use that no group has")
	}
}

func TestHasSuper(t *testing.T) {
	var groups []int64
	for g := range int64(400) {
		if hasSuper(g) {
			groups = append(groups, g)
		}
	}
	require.Equal(t, []int64{0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343}, groups)
}

func TestSizesOfStructures(t *testing.T) {
	require.Len(t, encode(superblock{}), superblockSize-4)
	require.Len(t, encode(groupDescriptor{}), descriptorSize)
	require.Len(t, encode(inode{}), inodeSize)
	require.Len(t, encode(quotaHeader{}), 32)
	require.Len(t, encode(quotaEntry{}), 72)
}

func TestBadInput(t *testing.T) {
	for name, test := range map[string]struct {
		size int64
		o    Options
	}{
		"too small":      {MinSize - blockSize, someOptions},
		"empty":          {0, someOptions},
		"negative":       {-blockSize, someOptions},
		"too large":      {MaxSize + blockSize, someOptions},
		"largest number": {math.MaxInt64, someOptions},
		"unaligned":      {gib + 512, someOptions},
		"no UUID":        {gib, with(func(o *Options) { o.UUID = [16]byte{} })},
		"long label":     {gib, with(func(o *Options) { o.Label = "a name of 17 byte" })},
		"NUL in label":   {gib, with(func(o *Options) { o.Label = "a\x00b" })},
		"before 1970":    {gib, with(func(o *Options) { o.Now = time.Unix(-1, 0) })},
		"after 2446":     {gib, with(func(o *Options) { o.Now = time.Unix(maxTime+1, 0) })},
		"mode":           {gib, with(func(o *Options) { o.RootMode = 0o40755 })},
		"no user":        {gib, with(func(o *Options) { o.RootUID = math.MaxUint32 })},
		"no group":       {gib, with(func(o *Options) { o.RootGID = math.MaxUint32 })},
		"many inodes":    {gib, with(func(o *Options) { o.InodeRatio = minInodeRatio - 1 })},
		"few inodes":     {gib, with(func(o *Options) { o.InodeRatio = maxInodeRatio + 1 })},
		"negative ratio": {gib, with(func(o *Options) { o.InodeRatio = -1 })},
	} {
		t.Run(name, func(t *testing.T) {
			d := &device{size: test.size}
			require.ErrorIs(t, Format(d, test.size, test.o), errdefs.ErrInvalidArgument)
			require.Empty(t, d.pieces)
		})
	}
}

// failing is a device that takes some pieces.
type failing struct {
	left  int
	first bool // block 0 was written
}

func (f *failing) WriteAt(b []byte, at int64) (int, error) {
	if f.left == 0 {
		return 0, syscall.EIO
	}
	f.left--
	f.first = f.first || at == 0
	return len(b), nil
}

func TestWriteErrors(t *testing.T) {
	d := &device{size: gib}
	require.NoError(t, Format(d, gib, someOptions))
	for n := range d.pieces {
		f := &failing{left: n}
		require.ErrorIs(t, Format(f, gib, someOptions), syscall.EIO)
		require.False(t, f.first, "the superblock was written before the rest")
	}
	require.Zero(t, d.pieces[len(d.pieces)-1].first)
}
