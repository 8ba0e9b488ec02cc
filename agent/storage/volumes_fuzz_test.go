// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// FuzzPutVolume puts two requests from the wire. Whatever they are, files are made in the volume's directory only, within
// the limits, and the volume shows what was committed before or what is committed now.
func FuzzPutVolume(f *testing.F) {
	if os.Getuid() != 0 {
		f.Skip("needs root to mount")
	}
	encode := func(r *agentv1.PutVolumeRequest) []byte {
		raw, err := proto.Marshal(r)
		require.NoError(f, err)
		return raw
	}
	f.Add(encode(putRequest(2, false, part("a", "x"), part("d/e", "y"))), encode(putRequest(2, true, further("a", 1, "z"))))
	f.Add(encode(putRequest(2, true, part("a/b", ""), part("a", ""))), encode(putRequest(3, true)))
	f.Add(encode(putRequest(2, true, part("../a", "x"))), encode(putRequest(2, true, part("..data", "x"))))
	f.Add(encode(&agentv1.PutVolumeRequest{Name: "../v", Generation: 1}), []byte("\x0a\x01v\x10\x02\x20\x01"))
	f.Add(encode(putRequest(2, false, &agentv1.VolumeFile{Path: "s", Mode: 0o6777, Uid: 1, Gid: 2})), encode(putRequest(1, true)))
	root := filepath.Join(f.TempDir(), "store")
	f.Fuzz(func(t *testing.T, first, second []byte) {
		s, err := New(root)
		require.NoError(t, err)
		defer func() { require.NoError(t, unix.Unmount(root, unix.MNT_DETACH)) }()
		putVolume(t, s, putRequest(1, true, part("old", "old"), part("d/old", "old")))
		dir := volumeDirectory(t, s)
		committed := false
		for _, raw := range [][]byte{first, second} {
			var r agentv1.PutVolumeRequest
			if proto.Unmarshal(raw, &r) != nil {
				return
			}
			before := content(t, dir)
			if err := s.PutVolume(context.Background(), &r); err != nil || !r.GetCommit() || r.GetName() != "v" {
				require.Equal(t, before, content(t, dir))
			} else {
				committed = true
			}
			checkTree(t, s.root)
		}
		if !committed {
			require.Equal(t, map[string]string{"old": "old", "d/old": "old"}, content(t, dir))
		}
	})
}

// checkTree checks a Store that holds volumes only.
func checkTree(t *testing.T, root string) {
	t.Helper()
	bytes := map[string]int64{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || d.IsDir() && strings.Count(rel, "/") < 2 {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		elements := strings.SplitN(rel, "/", 4)
		require.Equal(t, "volumes", elements[0], rel)
		switch info.Mode().Type() {
		case os.ModeSymlink:
			require.Len(t, elements, 3, "links are in the volume's own directory: %s", rel)
		case os.ModeDir, 0:
			require.True(t, strings.HasPrefix(elements[2], ".."), "%s is in no generation", rel)
			require.Zero(t, info.Mode()&^(os.ModeDir|os.ModePerm), rel)
			if !d.IsDir() {
				bytes[strings.Join(elements[:3], "/")] += info.Size()
			}
		default:
			t.Errorf("%s is %s", rel, info.Mode())
		}
		return nil
	}))
	for generation, n := range bytes {
		require.LessOrEqual(t, n, int64(wire.MaxVolumeBytes), generation)
	}
}
