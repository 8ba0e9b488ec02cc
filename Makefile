# SPDX-License-Identifier: Apache-2.0

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One thing at a time: Go and QEMU use the cores already.
.NOTPARALLEL:

CLOISTER_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cloister
export CLOISTER_CACHE

BIN     := bin
GUEST   := $(BIN)/guest
PREFIX  ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
MODULE  := github.com/cloister-project/cloister
STAMP   := -X $(MODULE)/internal/version.Version=$(VERSION)
GOFLAGS_COMMON := -trimpath -buildvcs=false

# build-go OUTPUT ENVIRONMENT FLAGS PACKAGE builds beside the output and replaces it only if it became another, so
# that what is made from it (the guest image) is not made anew for nothing.
define build-go
mkdir -p $(BIN)/.new
$(2) $(GO) build $(GOFLAGS_COMMON) $(3) -o $(BIN)/.new/$(1) ./cmd/$(1)
cmp -s $(BIN)/.new/$(1) $(BIN)/$(1) || cp --remove-destination $(BIN)/.new/$(1) $(BIN)/$(1)
endef

##@ Use

.PHONY: help
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## "; print "Cloister: every pod in its own micro-VM.\n\nusage: make TARGET" } \
	  /^##@ / { print "\n" substr($$0, 5) ":" } \
	  /^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: KEEP=1 (run: leave the pod up), RUN=regexp (test, test-e2e: only these tests),\n'
	@printf '           PREFIX, DESTDIR, SYSCONFDIR (install), CLOISTER_CACHE (now $(CLOISTER_CACHE))\n'

.PHONY: run
run: ## The main job: containerd starts a pod in a micro-VM and runs its containers (as root; KEEP=1 leaves it up)
	@mkdir -p $(BIN) && CGO_ENABLED=0 $(GO) build $(GOFLAGS_COMMON) -o $(BIN)/mainjob ./tools/mainjob
	@exec $(BIN)/mainjob $(if $(filter-out 0,$(KEEP)),-keep)

.PHONY: stop
stop: ## Stop what `make run KEEP=1`, or a test that was killed, left up
	@mkdir -p $(BIN) && CGO_ENABLED=0 $(GO) build $(GOFLAGS_COMMON) -o $(BIN)/mainjob ./tools/mainjob
	@exec $(BIN)/mainjob -stop

.PHONY: install
install: build guest ## Install into PREFIX (/usr/local) and SYSCONFDIR (/etc); an existing cloister.toml is kept
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/share/cloister' '$(DESTDIR)$(SYSCONFDIR)/cloister/config.d'
	install -m 0755 $(BIN)/containerd-shim-cloister-v2 $(BIN)/cloister '$(DESTDIR)$(PREFIX)/bin/'
	install -m 0644 $(GUEST)/vmlinuz $(GUEST)/initrd.img $(GUEST)/guest.json '$(DESTDIR)$(PREFIX)/share/cloister/'
	sed 's|"/usr/share/cloister/|"$(PREFIX)/share/cloister/|' configs/cloister.toml > $(BIN)/.new/cloister.toml
	@conf='$(DESTDIR)$(SYSCONFDIR)/cloister/cloister.toml'; \
	if [ -e "$$conf" ] && ! cmp -s $(BIN)/.new/cloister.toml "$$conf"; then \
	  echo "keeping $$conf, the new one is beside it as cloister.toml.new"; conf=$$conf.new; \
	fi; \
	install -m 0644 $(BIN)/.new/cloister.toml "$$conf"

##@ Build

.PHONY: setup
setup: ## Install and download what building and running need (Debian 12 or 13, as root; repeatable)
	@tools/setup

.PHONY: proto
proto: ## Generate Go from agent.proto anew (needs protoc)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	GOBIN=$$dir $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc && \
	PATH=$$dir:$$PATH $(GO) generate ./agent-protocol/... ./shim/criv1

.PHONY: conformance
conformance: ## Build containerd, ctr, runc, crictl, nerdctl and CNI plugins into the cache
	@tools/conformance/build

.PHONY: build
build: ## Build shim, agent and operator's tool into bin/
	@$(call build-go,containerd-shim-cloister-v2,CGO_ENABLED=0,-tags no_grpc -ldflags '-s -w $(STAMP)')
	@$(call build-go,cloister,CGO_ENABLED=0,-tags no_grpc -ldflags '-s -w $(STAMP)')
	@$(MAKE) -s agent

# The agent needs C: libcontainer enters namespaces before Go's runtime starts, and seccomp profiles are compiled by
# libseccomp. Linked statically, since the guest has nothing but it.
.PHONY: agent
agent:
	@$(call build-go,cloister-agent,CGO_ENABLED=1,-tags 'seccomp netgo osusergo' -ldflags '-s -w $(STAMP) -linkmode external -extldflags -static')

.PHONY: guest
guest: agent ## Build the guest image, kernel and initrd, into bin/guest/
	@. '$(CLOISTER_CACHE)/env' || { echo 'this machine is not set up: run `make setup`' >&2; exit 1; }; \
	identity=$$(cat $(BIN)/cloister-agent tools/guest/*.go go.sum "$$CLOISTER_KERNEL" | sha256sum); \
	if [ "$$(cat $(GUEST)/.made-from 2>/dev/null)" != "$$identity" ]; then \
	  mkdir -p $(GUEST); \
	  CGO_ENABLED=0 $(GO) run $(GOFLAGS_COMMON) ./tools/guest -kernel "$$CLOISTER_KERNEL" -modules "$$CLOISTER_MODULES" \
	    -agent $(BIN)/cloister-agent -version '$(VERSION)' -out $(GUEST); \
	  echo "$$identity" > $(GUEST)/.made-from; \
	fi

##@ Check

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, shell syntax
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l); \
	if [ -n "$$unformatted" ]; then echo "not gofmt-clean:" $$unformatted >&2; exit 1; fi
	$(GO) vet -tags seccomp ./...
	$(GO) tool staticcheck -tags seccomp ./...
	@for script in tools/setup tools/conformance/build tools/left-out .ci/run; do bash -n $$script; done
	@long=$$(git ls-files -co --exclude-standard '*.go' | grep -vE '(_test|\.pb)\.go$$' | xargs -r wc -l | \
	  awk '$$2 != "total" && $$1 > 500 { print $$2 " (" $$1 " lines)" }'); \
	if [ -n "$$long" ]; then echo "longer than 500 lines, split them:" $$long >&2; exit 1; fi

.PHONY: test
test: setup conformance build guest test-unit test-vm test-e2e ## All tests (as root); at the end, which lanes were left out and why
	@tools/left-out

# The agent's packages need C (see agent above); the race detector does too.
.PHONY: test-unit
test-unit: setup ## The quick tests, with the race detector; what needs root or a VM is skipped
	CGO_ENABLED=1 $(GO) test -race -tags 'seccomp netgo osusergo' -timeout 15m $(if $(RUN),-run '$(RUN)') \
	  $$($(GO) list ./... | grep -v '^$(MODULE)/test/')

# Packages that start QEMU by themselves, on the kernel that setup fetched.
VM_PACKAGES := ./hypervisor/qemu ./hypervisor/pvh ./hypervisor/vsock/vhostuser ./virtcontainers/share
.PHONY: test-vm
test-vm: setup ## Tests of single packages in real VMs (as root)
	@. '$(CLOISTER_CACHE)/env'; \
	export CLOISTER_TEST_KERNEL="$$CLOISTER_KERNEL" CLOISTER_TEST_MODULES="$$CLOISTER_MODULES" \
	  CLOISTER_TEST_VIRTIOFSD="$$CLOISTER_VIRTIOFSD" CLOISTER_TEST_QEMU="$$CLOISTER_QEMU"; \
	$(GO) test -count=1 -p 1 -timeout 20m $(if $(RUN),-run '$(RUN)' -v) $(VM_PACKAGES)

# One package and one test at a time: each VM under emulation takes a core. No cached results: what is tested are
# binaries and an image that Go does not know of.
.PHONY: test-e2e
test-e2e: ## End-to-end tests on what is built (as root)
	CLOISTER_E2E=required $(GO) test -count=1 -p 1 -timeout 90m $(if $(RUN),-run '$(RUN)' -v) ./test/...

.PHONY: bench
bench: setup conformance build guest ## Measure the budget table (as root)
	@CGO_ENABLED=0 $(GO) run $(GOFLAGS_COMMON) ./tools/bench

##@ Clean

.PHONY: clean
clean: ## Remove bin/; downloads and conformance binaries stay in the cache
	rm -rf $(BIN)

.PHONY: clean-cache
clean-cache: ## Remove the cache: the next setup downloads and builds everything anew
	@[ -z "$$(ls '$(CLOISTER_CACHE)/nodes' 2>/dev/null)" ] || { echo 'nodes are still up: run `make stop` first' >&2; exit 1; }
	rm -rf '$(CLOISTER_CACHE)'
