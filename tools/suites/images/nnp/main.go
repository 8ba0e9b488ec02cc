// SPDX-License-Identifier: Apache-2.0

// Command nnp prints its effective user. The image "nonewprivs" has it with the set-user-ID bit.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Println("Effective uid:", os.Geteuid()) }
