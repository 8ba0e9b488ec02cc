// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// podMoves are the moves from each state of a pod. The package comment draws them.
var podMoves = map[PodState][]PodState{
	PodCreated:  {PodStarting, PodStopped},
	PodStarting: {PodReady, PodStopped},
	PodReady:    {PodStopped},
	PodStopped:  {},
}

// processMoves are the moves from each state of a process. The package comment draws them.
var processMoves = map[ProcessStatus][]ProcessStatus{
	ProcessCreated: {ProcessRunning, ProcessStopped},
	ProcessRunning: {ProcessCreated, ProcessPaused, ProcessStopped},
	ProcessPaused:  {ProcessRunning, ProcessStopped},
	ProcessStopped: {},
}

// checkMove returns errdefs.ErrFailedPrecondition for a move that is not in the table.
func checkMove[S ~string](table map[S][]S, from, to S) error {
	if slices.Contains(table[from], to) {
		return nil
	}
	return fmt.Errorf("it is %s and cannot become %s: %w", from, to, errdefs.ErrFailedPrecondition)
}
