// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/json"
	"fmt"
	"math/big"
	"regexp"
	"strconv"
)

// Quantity is a number as Kubernetes writes it: "500m", "1.5", "128Mi", 2.
type Quantity struct{ value *big.Rat }

var (
	quantityPattern = regexp.MustCompile(`^([0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:([eE])([+-]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)$`)
	// Powers of ten, and of two for those with an i (k8s.io/apimachinery/pkg/api/resource).
	decimalSuffix = map[string]int{"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
	binarySuffix  = map[string]uint{"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
)

// UnmarshalJSON takes text or a number.
func (q *Quantity) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		text = string(data)
	}
	var err error
	*q, err = parseQuantity(text)
	return err
}

func parseQuantity(text string) (Quantity, error) {
	fault := fmt.Errorf("%.40q is not a quantity such as 500m, 1.5 or 128Mi", text)
	m := quantityPattern.FindStringSubmatch(text)
	if m == nil {
		return Quantity{}, fault
	}
	value, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return Quantity{}, fault
	}
	exponent := decimalSuffix[m[4]]
	if m[2] != "" {
		exponent, _ = strconv.Atoi(m[3])
	}
	scale := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(max(exponent, -exponent))), nil)
	if shift, ok := binarySuffix[m[4]]; ok {
		scale, exponent = new(big.Int).Lsh(big.NewInt(1), shift), 1
	}
	if exponent < 0 {
		value.Quo(value, new(big.Rat).SetInt(scale))
	} else {
		value.Mul(value, new(big.Rat).SetInt(scale))
	}
	return Quantity{value}, nil
}

// times returns the quantity in units of 1/n, rounded up; the largest int64 if it is more.
func (q Quantity) times(n int64) int64 {
	if q.value == nil {
		return 0
	}
	v := new(big.Rat).Mul(q.value, new(big.Rat).SetInt64(n))
	up := new(big.Int).Add(v.Num(), new(big.Int).Sub(v.Denom(), big.NewInt(1)))
	up.Div(up, v.Denom())
	if !up.IsInt64() {
		return 1<<63 - 1
	}
	return up.Int64()
}
