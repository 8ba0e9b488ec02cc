// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/tee/se/image"
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
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: request for %s\n%s: KEEP SECRET, needed to check the answer\n", output,
				plural(len(keys), "machine"), secret)
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

// maxAnswer bounds an answer: a request, the machine's answer and user data, all of which have smaller limits of their own.
const maxAnswer = 1 << 20

func seVerifyCommand() *cobra.Command {
	var (
		secret, imagePath, initdataFile string
		asJSON                          bool
	)
	cmd := &cobra.Command{
		Use:   "attest-verify ANSWER",
		Short: "Check a guest's answer to an attestation request",
		Long: "attest-verify checks that an answer, in the format of s390-tools' pvattest, was made by a machine that the request was\n" +
			"for, of a guest that runs the image. With --initdata it checks too that the guest's user data is the digest of that\n" +
			"document, with zeros after it up to 64 bytes: whoever asks for the answer in the guest has to put it there, Cloister's\n" +
			"agent does not yet.\n\n" +
			"The secret is what attest-request wrote; whoever else has it can forge an answer. Exit status: 0 the answer is good.",
		Args: oneArg("an answer"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if secret == "" || imagePath == "" {
				return usage("--secret and --image are needed")
			}
			evidence, err := verifyAnswer(args[0], secret, imagePath)
			if err != nil {
				return err
			}
			if initdataFile != "" {
				if err := checkUserData(evidence, initdataFile); err != nil {
					return err
				}
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), evidence)
			}
			out := printer{w: cmd.OutOrStdout()}
			out.line("the answer is good: a machine that the request was for answered, and its guest runs %s", imagePath)
			out.line("guest      %s", evidence.CUID)
			for _, v := range []struct {
				name  string
				value image.Hex
			}{
				{"user data ", evidence.User}, {"image key ", evidence.ImageHostKey}, {"answer key", evidence.AttestHostKey},
				{"secrets   ", evidence.SecretStore}, {"firmware  ", evidence.Firmware},
			} {
				if v.value != nil {
					out.line("%s %s", v.name, v.value)
				}
			}
			return out.err
		},
	}
	cmd.Flags().StringVar(&secret, "secret", "", "secret that attest-request wrote with the request (needed)")
	cmd.Flags().StringVar(&imagePath, "image", "", "the Secure Execution image that the guest should run (needed)")
	cmd.Flags().StringVar(&initdataFile, "initdata", "", "initdata document whose digest the guest's user data must be")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func verifyAnswer(answerPath, secretPath, imagePath string) (*attest.Evidence, error) {
	content, _, err := firmware.ReadFile(answerPath, maxAnswer)
	if err != nil {
		return nil, err
	}
	answer, err := attest.ParseExchange(content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", answerPath, err)
	}
	if content, _, err = firmware.ReadFile(secretPath, maxAnswer); err != nil {
		return nil, fmt.Errorf("--secret: %w", err)
	}
	s, err := attest.ParseSecret(content)
	if err != nil {
		return nil, fmt.Errorf("--secret: %w", err)
	}
	info, err := image.InspectFile(imagePath)
	if err != nil {
		return nil, fmt.Errorf("--image: %w", err)
	}
	return attest.Verify(s, info.Header(), answer)
}

// checkUserData compares what the guest put into its answer with a document.
func checkUserData(e *attest.Evidence, path string) error {
	content, _, err := firmware.ReadFile(path, initdata.MaxRaw)
	if err != nil {
		return fmt.Errorf("--initdata: %w", err)
	}
	doc, err := initdata.Parse(content)
	if err != nil {
		return fmt.Errorf("--initdata: %w", err)
	}
	if want := attest.UserData(doc.Digest()); !bytes.Equal(want[:], e.User) {
		return fmt.Errorf("the guest's user data is %s, and not the digest of %s (%s)", e.User, path, doc)
	}
	return nil
}
