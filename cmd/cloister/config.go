// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
)

func configCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the reference configuration: every key with its default and its reason",
		Long: "config prints the reference configuration: every key with its default and its reason. With --tee it prints the\n" +
			"drop-in of a platform, to be copied into config.d beside a node's cloister.toml.",
		Example: "  cloister config --tee snp > /etc/cloister/config.d/50-snp.toml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text := configs.Base()
			if name != "" {
				var err error
				if text, err = configs.PlatformDropIn(name); err != nil {
					return usage("--tee: %w", err)
				}
			}
			_, err := cmd.OutOrStdout().Write(text)
			return err
		},
	}
	cmd.Flags().StringVar(&name, "tee", "", "print the drop-in of this platform: sample, snp, tdx or se")
	return cmd
}
