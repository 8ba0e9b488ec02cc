// SPDX-License-Identifier: Apache-2.0

// Command cloister is the operator's tool.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-project/cloister/internal/version"
)

// Exit statuses of all commands.
const (
	exitOK    = 0
	exitNo    = 1 // what was asked about is not so, or did not work
	exitUsage = 2 // the command line is wrong
)

// usageError is a wrong command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usage(format string, a ...any) error { return usageError{fmt.Errorf(format, a...)} }

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole tool. It returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:   "cloister",
		Short: "Operate Cloister, the runtime that runs each pod in a micro-VM of its own",
		Long: "cloister tells what a node can do, what it would start, and what the hardware would measure of it.\n\n" +
			"Exit status of all commands: 0 yes or done, 1 no or failed, 2 wrong usage.",
		// An error of a check is not a wrong command line.
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(checkCommand(), planCommand(), measureCommand(), evidenceCommand(), imageCommand(), configCommand())
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentPreRunE = noEmptyFlags
	root.SetHelpCommand(helpCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	_, _, err := root.Find(args)
	if err != nil {
		err = usageError{err}
	} else {
		err = root.ExecuteContext(ctx)
	}
	var wrong usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "cloister: %v (see cloister help)\n", err)
		return exitUsage
	}
	fmt.Fprintln(stderr, "cloister:", err)
	return exitNo
}

// helpCommand is cobra's, but for topics that do not exist.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [command]",
		Short: "Help about any command",
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usage("there is no command %q", strings.Join(args, " "))
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

// noEmptyFlags refuses flags with an empty value: a script's variable that is not set, where a value was meant.
func noEmptyFlags(cmd *cobra.Command, _ []string) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" && err == nil {
			err = usage("--%s is empty; give a value, or leave it out", f.Name)
		}
	})
	return err
}

// noArgs refuses arguments that are no flags.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%s takes no argument %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// oneArg demands exactly one.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usage("%s needs one argument, %s", cmd.CommandPath(), what)
		}
		return nil
	}
}

// group is a command that only holds others.
func group(cmd *cobra.Command, sub ...*cobra.Command) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage("%s has no command %q", cmd.CommandPath(), args[0])
		}
		return cmd.Help()
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.AddCommand(sub...)
	return cmd
}
