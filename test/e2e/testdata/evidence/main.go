// SPDX-License-Identifier: Apache-2.0

// Command evidence runs in a privileged container of a guest and fetches evidence from the guest's hardware, for the
// end-to-end tests. What it prints proves nothing before somebody outside checked it.
//
//	evidence tsm NONCE            a report with a nonce (base64, 64 bytes) through configfs-tsm: SEV-SNP and TDX
//	evidence uv EXCHANGE USER     the answer to an attestation request (base64, pvattest's format) with user data (base64):
//	                              Secure Execution
//	evidence open DIRECTORY          opens the device of a directory of sysfs, the way that uv opens its own
package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "evidence:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "tsm":
		nonce, err := base64.StdEncoding.DecodeString(args[1])
		if err != nil {
			return fmt.Errorf("the nonce: %w", err)
		}
		said, err := tsmReport(nonce)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(said)
	case len(args) == 3 && args[0] == "uv":
		exchange, err := base64.StdEncoding.DecodeString(args[1])
		if err != nil {
			return fmt.Errorf("the exchange: %w", err)
		}
		user, err := base64.StdEncoding.DecodeString(args[2])
		if err != nil {
			return fmt.Errorf("the user data: %w", err)
		}
		answer, err := uvAnswer(exchange, user)
		if err != nil {
			return err
		}
		_, err = fmt.Println(base64.StdEncoding.EncodeToString(answer))
		return err
	case len(args) == 2 && args[0] == "open":
		fd, how, err := openDevice(args[1])
		if err != nil {
			return err
		}
		_, err = fmt.Println(how)
		_ = fd.Close()
		return err
	}
	return fmt.Errorf("usage: evidence tsm NONCE | uv EXCHANGE USER | open DIRECTORY")
}
