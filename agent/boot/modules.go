// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/tee/abi"
)

// The image's list of modules: one line a module, "PHASE FILE [PARAMETERS]", in load order. tools/guest writes it.
const (
	modulesDir = "lib/modules"
	loadList   = modulesDir + "/load"

	phaseEarly = "early"
	phaseLater = "later"
	// phaseConfidential is of guests on any platform but abi.None.
	phaseConfidential = "confidential"
)

// phases are all phases. Those behind the first three have the names of platforms: their modules are loaded in guests that
// are launched on it, after the later ones; those of abi.None in ordinary ones.
var phases = []string{phaseEarly, phaseLater, phaseConfidential, string(abi.None), string(abi.SNP), string(abi.TDX), string(abi.SE)}

// listed is a line of the list.
type listed struct{ phase, file, params string }

// readLoadList reads the list. An image without modules has an empty one; a missing one is an error.
func readLoadList(initramfs *os.Root) ([]listed, error) {
	f, err := initramfs.Open(loadList)
	if err != nil {
		return nil, fmt.Errorf("the guest image has no list of modules: %w", err)
	}
	defer f.Close()
	return parseLoadList(f)
}

func parseLoadList(r io.Reader) ([]listed, error) {
	var out []listed
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		phase, rest, _ := strings.Cut(lines.Text(), " ")
		file, params, _ := strings.Cut(rest, " ")
		if !slices.Contains(phases, phase) || file == "" || strings.Contains(file, "/") {
			return nil, fmt.Errorf("/%s has a line that is not \"PHASE FILE\" with a phase of %s: %q", loadList, strings.Join(phases, ", "),
				lines.Text())
		}
		out = append(out, listed{phase, file, params})
	}
	return out, lines.Err()
}

// loadModules loads the modules of one phase in their order and calls mark after each.
func loadModules(initramfs *os.Root, list []listed, phase string, mark func(string)) error {
	for _, l := range list {
		if l.phase != phase {
			continue
		}
		if err := loadModule(initramfs, l); err != nil {
			return fmt.Errorf("load kernel module %s: %w", l.file, err)
		}
		mark("module " + strings.TrimSuffix(l.file, ".ko"))
	}
	return nil
}

func loadModule(initramfs *os.Root, l listed) error {
	f, err := initramfs.Open(modulesDir + "/" + l.file)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), l.params, 0)
	if errors.Is(err, unix.EEXIST) { // built in, or loaded already
		return nil
	}
	return err
}

// lockModules makes the kernel refuse modules from now on. A kernel that has no modules needs no lock.
func lockModules(must bool) error {
	err := os.WriteFile("/proc/sys/kernel/modules_disabled", []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) && !must {
		return nil
	}
	return err
}

// scanSCSI makes the kernel look for disks. The image loads scsi_mod with scan=manual, see tools/guest: disks that were
// there before the driver, or were plugged in since, wait to be looked for; those that come later announce themselves
// once the parameter is back to what it was.
func scanSCSI() error {
	const parameter = "/sys/module/scsi_mod/parameters/scan"
	if err := os.WriteFile(parameter, []byte("async"), 0); errors.Is(err, os.ErrNotExist) {
		return nil // no SCSI in this image
	} else if err != nil {
		return fmt.Errorf("make the kernel listen for new disks: %w", err)
	}
	hosts, err := filepath.Glob("/sys/class/scsi_host/host*/scan")
	if err != nil {
		return err
	}
	for _, host := range hosts {
		if err := os.WriteFile(host, []byte("- - -"), 0); err != nil {
			return fmt.Errorf("look for disks: %w", err)
		}
	}
	return nil
}
