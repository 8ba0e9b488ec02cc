# SPDX-License-Identifier: Apache-2.0

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One thing at a time: Go and QEMU use the cores already.
.NOTPARALLEL:

CLOISTER_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cloister
export CLOISTER_CACHE

# The architecture to build for: amd64, or s390x by cross-compiling with what `make setup` installed.
ARCH    ?= amd64
SUFFIX  := $(if $(filter-out amd64,$(ARCH)),-$(ARCH))
BIN     := bin
# Cloister's binaries, and the guest image, of the architecture.
OUT     := $(BIN)$(if $(SUFFIX),/$(ARCH))
GUEST   := $(BIN)/guest$(SUFFIX)
PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
MODULE  := github.com/cloister-project/cloister
STAMP   := -X $(MODULE)/internal/version.Version=$(VERSION)
GOFLAGS_COMMON := -trimpath -buildvcs=false

# The agent needs C: libcontainer enters namespaces before Go's runtime starts, and seccomp profiles are compiled by
# libseccomp. Linked statically, since the guest has no libraries. For s390x it is built by the cross compiler, against the
# libseccomp that setup unpacked.
AGENT_ENV_amd64 := CGO_ENABLED=1
AGENT_ENV_s390x = CGO_ENABLED=1 CC=s390x-linux-gnu-gcc CGO_CFLAGS="-O2 -I$$CLOISTER_S390X_SYSROOT/usr/include" \
  CGO_LDFLAGS="-L$$CLOISTER_S390X_SYSROOT/usr/lib/s390x-linux-gnu" \
  PKG_CONFIG_LIBDIR="$$CLOISTER_S390X_SYSROOT/usr/lib/s390x-linux-gnu/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$$CLOISTER_S390X_SYSROOT"
AGENT_FLAGS := -tags 'seccomp netgo osusergo' -ldflags '-s -w $(STAMP) -linkmode external -extldflags -static'

# setup-env reads what tools/setup found and unpacked.
setup-env = . '$(CLOISTER_CACHE)/env' || { echo 'this machine is not set up: run `make setup`' >&2; exit 1; } \
  $(if $(SUFFIX),; : "$${CLOISTER_S390X_SYSROOT:?this machine is not set up for s390x: run make setup}")

# build-go OUTPUT ENVIRONMENT FLAGS builds next to the output and replaces it only if it changed, so that what is
# made from it (the guest image) is not rebuilt for nothing.
define build-go
mkdir -p $(OUT)/.new; \
GOARCH=$(ARCH) $(2) $(GO) build $(GOFLAGS_COMMON) $(3) -o $(OUT)/.new/$(1) ./cmd/$(1); \
cmp -s $(OUT)/.new/$(1) $(OUT)/$(1) || cp --remove-destination $(OUT)/.new/$(1) $(OUT)/$(1)
endef

##@ Use

.PHONY: help
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## "; print "Cloister: every pod in its own micro-VM.\n\nusage: make TARGET" } \
	  /^##@ / { print "\n" substr($$0, 5) ":" } \
	  /^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: KEEP=1 (run: keep the pod running), RUN=regexp (test, test-e2e: only these tests),\n'
	@printf '           ARCH=s390x (build, guest, install: for IBM Z), COMPRESSION=zstd (guest: a smaller initrd),\n'
	@printf '           PREFIX, DESTDIR, SYSCONFDIR (install), CLOISTER_CACHE (now $(CLOISTER_CACHE))\n'

.PHONY: run
run: ## The main job: containerd starts a pod in a micro-VM and runs its containers (as root; KEEP=1 keeps it running)
	@[ -e $(BIN)/prepare ] || echo '==> build what shows this (about 15 s the first time)'
	@mkdir -p $(BIN); since=$$(date +%s%3N); CGO_ENABLED=0 $(GO) build $(GOFLAGS_COMMON) -o $(BIN)/prepare ./tools/prepare; \
	exec $(BIN)/prepare -since $$since $(if $(filter-out 0,$(KEEP)),-keep)

# What tools/prepare calls, for `make run`.
.PHONY: mainjob
mainjob:
	@mkdir -p $(BIN) && CGO_ENABLED=0 $(GO) build $(GOFLAGS_COMMON) -o $(BIN)/mainjob ./tools/mainjob

.PHONY: setup-run
setup-run:
	@tools/setup run

.PHONY: modules
modules:
	@$(GO) list -deps -tags 'seccomp netgo osusergo no_grpc' ./cmd/... ./tools/mainjob ./tools/guest > /dev/null

.PHONY: stop
stop: mainjob ## Stop what `make run KEEP=1`, or a test that was killed, left running
	@exec $(BIN)/mainjob -stop

.PHONY: install
install: build guest ## Install into PREFIX (/usr/local) and SYSCONFDIR (/etc); an existing cloister.toml is kept
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/share/cloister' '$(DESTDIR)$(SYSCONFDIR)/cloister/config.d'
	install -m 0755 $(OUT)/containerd-shim-cloister-v2 $(OUT)/cloister '$(DESTDIR)$(PREFIX)/bin/'
	install -m 0644 $(GUEST)/vmlinuz $(GUEST)/initrd.img $(GUEST)/guest.json '$(DESTDIR)$(PREFIX)/share/cloister/'
	install -m 0644 configs/containerd-config.toml configs/runtimeclass.yaml '$(DESTDIR)$(PREFIX)/share/cloister/'
	install -d '$(DESTDIR)$(PREFIX)/share/cloister/platforms'
	install -m 0644 configs/platforms/*.toml '$(DESTDIR)$(PREFIX)/share/cloister/platforms/'
	sed 's|"/usr/share/cloister/|"$(PREFIX)/share/cloister/|' configs/cloister.toml > $(OUT)/.new/cloister.toml
	@conf='$(DESTDIR)$(SYSCONFDIR)/cloister/cloister.toml'; \
	if [ -e "$$conf" ] && ! cmp -s $(OUT)/.new/cloister.toml "$$conf"; then \
	  echo "keeping $$conf, the new one is next to it as cloister.toml.new"; conf=$$conf.new; \
	fi; \
	install -m 0644 $(OUT)/.new/cloister.toml "$$conf"

##@ Build

.PHONY: setup
setup: ## Install and download what building and running need (Debian 12 or 13, as root; safe to repeat)
	@tools/setup

.PHONY: proto
proto: ## Generate Go from agent.proto (needs protoc)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	GOBIN=$$dir $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc && \
	PATH=$$dir:$$PATH $(GO) generate ./agent-protocol/... ./shim/criv1

.PHONY: peers
peers: ## Build containerd, ctr, runc, crictl, nerdctl and CNI plugins into the cache
	@tools/conformance/build

.PHONY: build
build: build-host agent ## Build shim, agent and operator's tool into bin/

.PHONY: build-host
build-host:
	@$(call build-go,containerd-shim-cloister-v2,CGO_ENABLED=0,-tags no_grpc -ldflags '-s -w $(STAMP)')
	@$(call build-go,cloister,CGO_ENABLED=0,-tags no_grpc -ldflags '-s -w $(STAMP)')

.PHONY: agent
agent:
	@$(if $(SUFFIX),$(setup-env);) $(call build-go,cloister-agent,$(AGENT_ENV_$(ARCH)),$(AGENT_FLAGS))

# How the initrd is packed: none starts fastest; zstd is a third of the size, where that counts more (tools/guest/build.go).
COMPRESSION ?= none

GUEST_KERNEL_amd64  = $$CLOISTER_KERNEL
GUEST_MODULES_amd64 = $$CLOISTER_MODULES
GUEST_KERNEL_s390x  = $$CLOISTER_S390X_KERNEL
GUEST_MODULES_s390x = $$CLOISTER_S390X_MODULES

.PHONY: guest
guest: agent ## Build the guest image, kernel and initrd, into bin/guest/
	@$(setup-env); \
	identity="$(COMPRESSION) $$(cat $(OUT)/cloister-agent tools/guest/*.go go.sum "$(GUEST_KERNEL_$(ARCH))" | sha256sum)"; \
	if [ "$$(cat $(GUEST)/.made-from 2>/dev/null)" != "$$identity" ]; then \
	  mkdir -p $(GUEST); \
	  CGO_ENABLED=0 $(GO) run $(GOFLAGS_COMMON) ./tools/guest -arch $(ARCH) -kernel "$(GUEST_KERNEL_$(ARCH))" \
	    -modules "$(GUEST_MODULES_$(ARCH))" -agent $(OUT)/cloister-agent -version '$(VERSION)' \
	    -compression '$(COMPRESSION)' -out $(GUEST); \
	  echo "$$identity" > $(GUEST)/.made-from; \
	fi

.PHONY: build-s390x
build-s390x: ## Build shim, agent and operator's tool for IBM Z into bin/s390x/
	@$(MAKE) -s build ARCH=s390x

.PHONY: guest-s390x
guest-s390x: ## Build the guest image for IBM Z into bin/guest-s390x/
	@$(MAKE) -s guest ARCH=s390x

##@ Check

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, shell syntax, length of lines and files
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l); \
	if [ -n "$$unformatted" ]; then echo "not gofmt-clean:" $$unformatted >&2; exit 1; fi
	@programs=$$(git ls-files -co --exclude-standard 'test/e2e/testdata/*.go' | xargs -n 1 dirname | sort -u | sed 's|^|./|'); \
	set -x; $(GO) vet -tags seccomp ./... $$programs; $(GO) tool staticcheck -tags seccomp ./... $$programs
	@wide=$$(LC_ALL=C.UTF-8 git grep --untracked -nE '^.{141,}' -- '*.go' '*.md' '*.proto' ':!*.pb.go' ':!docs/conformance.md' | cut -c 1-80 || :); \
	if [ -n "$$wide" ]; then echo "lines of more than 140 columns, break them:" >&2; echo "$$wide" >&2; exit 1; fi
	@for script in tools/setup tools/conformance/build tools/left-out tools/qemu-next/run tools/test-kvm/{run,lane,inner} .ci/run; do bash -n $$script; done
	@long=$$(git ls-files -co --exclude-standard '*.go' | grep -vE '(_test|\.pb)\.go$$' | xargs -r wc -l | \
	  awk '$$2 != "total" && $$1 > 500 { print $$2 " (" $$1 " lines)" }'); \
	if [ -n "$$long" ]; then echo "longer than 500 lines, split them:" $$long >&2; exit 1; fi

.PHONY: test
test: setup peers build guest build-s390x guest-s390x test-unit test-vm test-e2e ## All tests (as root); ends with what was left out
	@tools/left-out $(BIN)

# Files that tests read: firmware with known measurements, kernels, boot stubs.
define test-files
$(setup-env); \
export CLOISTER_TEST_OVMF="$$CLOISTER_OVMF" CLOISTER_TEST_OVMF_AMDSEV="$$CLOISTER_OVMF_AMDSEV" \
  CLOISTER_TEST_OVMF_INTELTDX="$$CLOISTER_OVMF_INTELTDX" CLOISTER_TEST_FIRMWARE_DESCRIPTORS="$$CLOISTER_FIRMWARE_DESCRIPTORS" \
  CLOISTER_TEST_OVMF_TDX="$$CLOISTER_OVMF_TRIXIE" CLOISTER_TEST_SE_STUBS="$$CLOISTER_SE_STUBS" \
  CLOISTER_TEST_S390X_KERNEL="$$CLOISTER_S390X_KERNEL" CLOISTER_TEST_S390X_MODULES="$$CLOISTER_S390X_MODULES"
endef

# Programs and guest images with which tests start VMs.
define test-vms
$(test-files) \
  CLOISTER_TEST_KERNEL="$$CLOISTER_KERNEL" CLOISTER_TEST_MODULES="$$CLOISTER_MODULES" \
  CLOISTER_TEST_QEMU="$$CLOISTER_QEMU" CLOISTER_TEST_QEMU_S390X="$$CLOISTER_QEMU_S390X" \
  CLOISTER_TEST_VIRTIOFSD="$$CLOISTER_VIRTIOFSD" CLOISTER_TEST_VIRTIOFSD_C="$$CLOISTER_VIRTIOFSD_C" \
  CLOISTER_TEST_GUEST='$(CURDIR)/$(BIN)/guest' CLOISTER_TEST_GUEST_S390X='$(CURDIR)/$(BIN)/guest-s390x'
endef

# The agent's packages need C (see agent above); the race detector does too.
.PHONY: test-unit
test-unit: setup ## The quick tests, with the race detector; skips what needs root or a VM
	@$(test-files); \
	CGO_ENABLED=1 $(GO) test -race -tags 'seccomp netgo osusergo' -timeout 15m $(if $(RUN),-run '$(RUN)') \
	  $$($(GO) list ./... | grep -v '^$(MODULE)/test/')

# Packages that start VMs by themselves, on the kernels that setup fetched or on the guest image. Those of the
# first one are of the VMM that CLOISTER_TEST_VMM names (hypervisor/contract/doc.go).
VM_PACKAGES := ./hypervisor/contract ./hypervisor/qemu ./hypervisor/pvh ./hypervisor/vsock/vhostuser ./virtcontainers/share ./tee/... \
  ./agent/storage/ext4
.PHONY: test-vm
test-vm: setup guest guest-s390x ## Tests of single packages in real VMs (as root)
	@$(test-vms); \
	$(GO) test -count=1 -p 1 -timeout 20m $(if $(RUN),-run '$(RUN)' -v) $(VM_PACKAGES)

# Not part of `make test`: it fetches a newer Debian's QEMU and the libraries that it needs.
.PHONY: test-qemu-next
test-qemu-next: setup ## Command lines of all platforms against a newer QEMU, which knows TDX, unpacked into the cache
	@tools/qemu-next/run

# One package and one test at a time: each VM under emulation takes a core. No cached results: what is tested are
# binaries and an image that Go does not know of. On a machine with SEV-SNP, TDX or Secure Execution the lanes of the
# hardware run too; CLOISTER_TEST_TEE_CONFIG and CLOISTER_TEST_SE_{IMAGE,INITDATA,HOST_KEYS} in the environment tell them
# what only the operator knows (test/e2e/confidential_hardware_lanes_test.go).
.PHONY: test-e2e
test-e2e: ## End-to-end tests on what is built (as root)
	CLOISTER_E2E=required $(GO) test -count=1 -p 1 -timeout 90m $(if $(RUN),-run '$(RUN)' -v) ./test/...

# KVM on an emulated CPU, see tools/test-kvm/run. RUN is what test-e2e has as well.
.PHONY: test-kvm
test-kvm: setup peers build guest ## Tests on real KVM, vhost-vsock, vhost-net and cgroup v2, in an emulated machine (as root)
	@tools/test-kvm/run $(if $(RUN),-- tools/test-kvm/lane '$(RUN)')

define suites
tools/setup suites
tools/conformance/build containerd ctr containerd-shim-runc-v2 runc crictl bridge host-local loopback portmap \
  critest cri-integration client-suite crane
CGO_ENABLED=0 $(GO) run $(GOFLAGS_COMMON) ./tools/suites
endef

# RUNTIME=runc or cloister, SUITES=critest,client and FOCUS='regular expression' choose; DOCS=1 writes docs/conformance.md.
.PHONY: conformance
conformance: build guest ## Suites that others wrote, with runc and with Cloister, and what differs (as root; hours)
	@$(suites) $(if $(RUNTIME),-runtime '$(RUNTIME)') $(if $(SUITES),-suites '$(SUITES)') \
	  $(if $(FOCUS),-focus '$(FOCUS)') $(if $(filter-out 0,$(DOCS)),-docs)

.PHONY: conformance-quick
conformance-quick: build guest ## What the CRI requires of a runtime, of the same suites (as root; 15 minutes)
	@$(suites) -suites critest -focus '\[Conformance\]' -out $(BIN)/conformance/quick

.PHONY: bench
bench: setup peers build guest ## Measure the budget table (as root)
	@CGO_ENABLED=0 $(GO) run $(GOFLAGS_COMMON) ./tools/bench

##@ Clean

.PHONY: clean
clean: ## Remove bin/; downloads and conformance binaries stay in the cache
	rm -rf $(BIN)

.PHONY: clean-cache
clean-cache: ## Remove the cache: the next setup downloads and builds everything again
	@[ -z "$$(ls '$(CLOISTER_CACHE)/nodes' 2>/dev/null)" ] || { echo 'nodes are still up: run `make stop` first' >&2; exit 1; }
	rm -rf '$(CLOISTER_CACHE)'
