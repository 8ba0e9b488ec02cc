// SPDX-License-Identifier: Apache-2.0

// Command cloister is the operator's tool.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/internal/version"
)

func main() {
	root := &cobra.Command{
		Use:   "cloister",
		Short: "Operate Cloister, the runtime that runs each pod in a micro-VM of its own",
		// An error of a check is not a wrong command line.
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
	}
	root.AddCommand(checkCommand(), configCommand())
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "cloister:", err)
		os.Exit(1)
	}
}
