// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdh"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

func imageCommand() *cobra.Command {
	se := group(&cobra.Command{Use: "se", Short: "Images for IBM Secure Execution"}, seBuildCommand(), seInspectCommand(), seRequestCommand(),
		seVerifyCommand())
	return group(&cobra.Command{Use: "image", Short: "Make and look into sealed boot images"}, se)
}

// trustFlags are host key documents and what they are verified with.
type trustFlags struct {
	documents         []string
	roots, certs, crl []string
	noVerify          bool
}

func (f *trustFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&f.documents, "host-key-document", "k", nil, "host key document of a machine (repeat for more)")
	cmd.Flags().StringArrayVar(&f.certs, "cert", nil, "certificate of the IBM Z host key signing service, or of the intermediate CA that "+
		"signed it (repeat: both are needed)")
	cmd.Flags().StringArrayVar(&f.roots, "root-ca", nil, "root CA certificate that you trust (repeat for more)")
	cmd.Flags().StringArrayVar(&f.crl, "crl", nil, "revocation list (repeat: of the root, of each intermediate CA and of each signing key)")
	cmd.Flags().BoolVar(&f.noVerify, "no-verify", false, "believe host key documents as they are: whoever made them may read what is sealed")
}

// read returns the keys of all documents, verified, or with a warning for each.
func (f *trustFlags) read(warnings io.Writer) ([]*ecdh.PublicKey, error) {
	proofs := len(f.roots) + len(f.certs) + len(f.crl)
	switch {
	case len(f.documents) == 0:
		return nil, usage("give the host key document of each machine with --host-key-document")
	case f.noVerify && proofs > 0:
		return nil, usage("--no-verify with certificates or revocation lists: give one or the other")
	case !f.noVerify && proofs == 0:
		return nil, usage("host key documents are verified with --cert, --root-ca and --crl; without a proof whoever made a document may read " +
			"what is sealed (--no-verify)")
	}
	read := hostkey.ReadUnverified
	if !f.noVerify {
		files := hostkey.TrustFiles{Roots: f.roots, CRLs: f.crl}
		for _, path := range f.certs {
			signing, err := holdsSigningKey(path)
			switch {
			case err != nil:
				return nil, fmt.Errorf("--cert: %w", err)
			case signing:
				files.SigningKeys = append(files.SigningKeys, path)
			default:
				files.Intermediates = append(files.Intermediates, path)
			}
		}
		v, err := hostkey.NewVerifier(files)
		if err != nil {
			return nil, err
		}
		read = v.VerifyFile
	}
	var (
		keys []*ecdh.PublicKey
		errs []error
	)
	for _, path := range f.documents {
		d, err := read(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if w := d.Warning(); w != "" {
			fmt.Fprintln(warnings, "WARNING:", w)
		}
		keys = append(keys, d.Key)
	}
	return keys, errors.Join(errs...)
}

// holdsSigningKey sorts the files of --cert by what their first certificate says of itself; the verifier checks it.
func holdsSigningKey(path string) (bool, error) {
	b, _, err := firmware.ReadFile(path, hostkey.MaxCertificateFile)
	if err != nil {
		return false, err
	}
	if block, _ := pem.Decode(b); block != nil {
		b = block.Bytes
	}
	c, err := x509.ParseCertificate(b)
	if err != nil {
		return false, fmt.Errorf("%s is no certificate: %w", path, err)
	}
	return slices.ContainsFunc(c.Subject.OrganizationalUnit, func(u string) bool { return strings.HasSuffix(u, "Key Signing Service") }), nil
}

func seBuildCommand() *cobra.Command {
	var (
		trust                          trustFlags
		kernel, initrd, cmdline, stubs string
		initdataFile, cck, output      string
		force, asJSON                  bool
		options                        image.Options
	)
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Seal kernel, initrd and command line into an image that only given machines can open",
		Long: "build encrypts kernel, initrd and command line for the machines whose host key documents are given, on any machine that\n" +
			"you trust. Each document is verified up to a root CA that you name, with revocation lists. The image's tag, which is\n" +
			"printed, names everything that is sealed.\n\n" +
			"What the guest needs is added to the command line: that it runs on Secure Execution, and the digest of the initdata\n" +
			"document that it accepts (--initdata); without one it accepts none.",
		Example: "  cloister image se build --kernel vmlinuz --initrd initrd.img --stubs /usr/share/s390-tools/pvimg \\\n" +
			"    -k HKD-8562-12345.crt --cert ibm-z-host-key-signing.crt --cert DigiCertCA.crt --root-ca root.crt \\\n" +
			"    --crl ibm-z-host-key.crl --crl DigiCertCA.crl --crl root.crl --output se.img",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for flag, value := range map[string]string{"kernel": kernel, "stubs": stubs, "output": output} {
				if value == "" {
					return usage("--%s is needed", flag)
				}
			}
			if err := checkOutput(output, force); err != nil {
				return err
			}
			keys, err := trust.read(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			c := image.BuildConfig{HostKeys: keys, Options: options}
			if c.Sources, err = image.ReadSources(kernel, initrd, stubs); err != nil {
				return err
			}
			if c.Parameters, err = readCommandLine(cmdline); err != nil {
				return err
			}
			if initdataFile != "" {
				if c.Initdata, _, err = firmware.ReadFile(initdataFile, initdata.MaxRaw); err != nil {
					return fmt.Errorf("--initdata: %w", err)
				}
			}
			if cck != "" {
				if c.Options.CCK, err = firmware.ReadKeyFile(cck, image.CCKSize); err != nil {
					return fmt.Errorf("--cck: %w", err)
				}
			}
			img, err := image.Build(cmd.Context(), c)
			if err != nil {
				return err
			}
			if err := writeOutput(cmd.Context(), output, force, img); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), img.Info())
			}
			out := printer{w: cmd.OutOrStdout()}
			out.line("%s: %d bytes\nse.tag   %s\ncmdline  %s", output, img.Info().Size, img.Info().Tag, img.Parameters())
			return out.err
		},
	}
	trust.add(cmd)
	fl := cmd.Flags()
	fl.StringVar(&kernel, "kernel", "", "raw s390x kernel image (needed)")
	fl.StringVar(&initrd, "initrd", "", "initrd")
	fl.StringVar(&cmdline, "cmdline", "", "file with the kernel's command line (default: console=ttysclp0 quiet panic=-1 and so on, as for "+
		"other guests)")
	fl.StringVar(&stubs, "stubs", "", "directory with s390-tools' boot stubs stage3a.bin and stage3b_reloc.bin (needed)")
	fl.StringVar(&initdataFile, "initdata", "", "initdata document (TOML) that the guest accepts")
	fl.StringVar(&cck, "cck", "", fmt.Sprintf("file, not open to all users, with a customer communication key of %d bytes (default: a "+
		"random one that nobody knows)", image.CCKSize))
	fl.BoolVar(&options.AllowDump, "allow-dump", false, "let the host take dumps, which the CCK opens (weakens the guest; tee.allow_debug "+
		"must accept it)")
	fl.BoolVar(&options.CCKExtensionSecret, "cck-extension-secret", false, "make the CCK necessary for adding secrets")
	fl.BoolVar(&options.CCKUpdate, "cck-update", false, "let the guest replace its CCK")
	fl.BoolVar(&options.BackupTargetKeys, "backup-target-keys", false, "let machines open the image with their backup host keys too")
	fl.BoolVar(&options.NoPCKMO, "no-pckmo", false, "take the protected keys of the CPU's crypto functions away from the guest")
	fl.BoolVar(&options.PCKMOHMAC, "pckmo-hmac", false, "add protected keys for HMAC")
	fl.StringVarP(&output, "output", "o", "", "file to write (needed)")
	fl.BoolVar(&force, "force", false, "replace an existing output file")
	fl.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func seInspectCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect IMAGE",
		Short: "Show what an image tells without a key: its tag, its digests, and which machines can open it",
		Args:  oneArg("an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := image.InspectFile(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), info)
			}
			return printImage(cmd.OutOrStdout(), info)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printImage(w io.Writer, info *image.Info) error {
	out := printer{w: w}
	out.line("layout     %s, %d bytes", info.Layout, info.Size)
	out.line("header     %d bytes at 0x%x", info.HeaderSize, info.HeaderAddress)
	out.line("tag        %s", info.Tag)
	out.line("pld        %s\nald        %s\ntld        %s", info.PLD, info.ALD, info.TLD)
	out.line("flags      0x%016x %s", uint64(info.PCF), strings.Join(info.PCF.Names(), " "))
	out.line("encrypted  %s", plural(int(info.Pages), "page"))
	for _, h := range info.HostKeyHashes {
		out.line("host key   %s", h)
	}
	for _, c := range info.Components {
		out.line("component  %-10v 0x%08x %10d bytes", c.Kind, c.Address, c.Size)
	}
	return out.err
}

// maxCommandLine bounds the file; kernels take less.
const maxCommandLine = 64 << 10

func readCommandLine(path string) (string, error) {
	if path == "" {
		params, err := vmplan.SealedParameters()
		return strings.Join(params, " "), err
	}
	b, _, err := firmware.ReadFile(path, maxCommandLine)
	if err != nil {
		return "", fmt.Errorf("--cmdline: %w", err)
	}
	line := strings.TrimSpace(string(b))
	if strings.ContainsAny(line, "\r\n") {
		return "", fmt.Errorf("--cmdline: %s has more than one line", path)
	}
	return line, nil
}
