// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"time"
)

// median of the samples, 0 for none. It leaves the samples as they are.
func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// slope is the change of the samples from one to the next, by least squares.
func slope(samples []float64) float64 {
	n := float64(len(samples))
	if n < 2 {
		return 0
	}
	var sx, sy, sxx, sxy float64
	for i, y := range samples {
		x := float64(i)
		sx, sy, sxx, sxy = sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}

// growth compares the later half of a series with its earlier half, by their medians: 1 is flat. The one in the middle
// counts to neither.
func growth(series []float64) float64 {
	half := len(series) / 2
	if half == 0 {
		return 1
	}
	return median(series[len(series)-half:]) / median(series[:half])
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// mibPerSecond is the rate of so many bytes in that time.
func mibPerSecond(bytes int, took time.Duration) float64 {
	return float64(bytes) / (1 << 20) / took.Seconds()
}
