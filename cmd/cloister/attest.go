// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/tee/se/attest"
)

func seRequestCommand() *cobra.Command {
	var (
		trust          trustFlags
		output, secret string
		force          bool
		firmwareState  bool
	)
	cmd := &cobra.Command{
		Use:   "attest-request",
		Short: "Make an attestation request for a guest, and the secret that its answer is checked with",
		Long: "attest-request writes a request that the machines of the given host key documents can answer, in the format of\n" +
			"s390-tools' pvattest, and the secret that the answer is checked with. The request goes to the guest; whoever has the\n" +
			"secret can forge an answer.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "" || secret == "" {
				return usage("--output and --secret are needed")
			}
			for _, path := range []string{output, secret} {
				if err := checkOutput(path, force); err != nil {
					return err
				}
			}
			keys, err := trust.read(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			flags := attest.ImageHostKey | attest.AttestHostKey
			if firmwareState {
				flags |= attest.Firmware
			}
			request, s, err := attest.NewRequest(keys, flags, nil)
			if err != nil {
				return err
			}
			kept, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				return err
			}
			exchange, err := attest.NewExchange(request, s.Flags).Marshal()
			if err != nil {
				return err
			}
			// The secret first: a request without it is of no use.
			if err := writeOutput(cmd.Context(), secret, force, bytes.NewReader(append(kept, '\n'))); err != nil {
				return err
			}
			if err := writeOutput(cmd.Context(), output, force, bytes.NewReader(exchange)); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: request for %s\n%s: KEEP SECRET, needed to check the answer\n", output, plural(len(keys), "machine"), secret)
			return err
		},
	}
	trust.add(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write the request to (needed)")
	cmd.Flags().StringVar(&secret, "secret", "", "file to write the secret to, readable by you alone (needed)")
	cmd.Flags().BoolVar(&firmwareState, "firmware", false, "ask for the state of the machine's firmware too (newer machines)")
	cmd.Flags().BoolVar(&force, "force", false, "replace existing files")
	return cmd
}
