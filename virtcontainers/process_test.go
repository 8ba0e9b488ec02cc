// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestExitTime(t *testing.T) {
	created := time.Now().Add(-time.Hour)
	possible := created.Add(time.Minute)
	require.True(t, possible.Equal(exitTime(timestamppb.New(possible), created)))
	for name, said := range map[string]*timestamppb.Timestamp{
		"none":                 nil,
		"invalid":              {Nanos: -1},
		"before the pod":       timestamppb.New(created.Add(-time.Second)),
		"in the future":        timestamppb.New(time.Now().Add(time.Hour)),
		"beyond all calendars": {Seconds: 1 << 62},
	} {
		t.Run(name, func(t *testing.T) {
			before := time.Now()
			got := exitTime(said, created)
			require.False(t, got.Before(before) || got.After(time.Now()), got)
		})
	}
}
