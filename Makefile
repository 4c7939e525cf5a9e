# Thin: each target is a line or two. `make help` lists them.
SHELL := /bin/bash
SCENARIO ?= deploy/examples/four-clouds.yaml
BIN := target/release
ORACLES ?= ../shared/oracles

.PHONY: help setup build image demo test kernel-test kube-test kube-demo kube-bench unit check deny bench conformance fuzz clean
help:            ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

setup:           ## install what is missing from Debian/Ubuntu packages (needs root)
	@tests/setup/packages.sh

build: setup     ## build the release programs
	cargo build --release --locked --bins

image: build     ## the container image, target/sennit-image.tar
	@deploy/image/build.sh

demo: build      ## four sites, twelve nodes, one encrypted mesh, and a picture of it
	@SENNIT_BIN_DIR=$(CURDIR)/$(BIN) $(BIN)/meshlab run --picture $(SCENARIO) $(DEMO_ARGS)

test: setup      ## all tests
	@tests/setup/test.sh

kernel-test: setup ## the mesh with the kernel's WireGuard, and the guard at boot, on emulated machines (needs root, 5 minutes)
	@tests/kernel/run.sh $(TEST_ARGS)

kube-test: setup ## the mesh on real Kubernetes, control planes and whole nodes (needs root; builds Kubernetes the first time, ten minutes)
	@tests/kube/run.sh $(TEST_ARGS)

kube-demo: setup ## two clusters of two whole nodes and two plain hosts, from `kubectl apply -k` to one encrypted mesh
	@tests/kube/run.sh --nocapture two_clusters_and_two_hosts

kube-bench: build ## how long a node takes to join over a Kubernetes API, and a label to reach other nodes' kernels (six minutes)
	@SENNIT_KUBE_BIN=$$(tests/kube/binaries.sh) SENNIT_BIN_DIR=$(CURDIR)/$(BIN) $(BIN)/join-latency
	@SENNIT_KUBE_BIN=$$(tests/kube/binaries.sh) SENNIT_BIN_DIR=$(CURDIR)/$(BIN) $(BIN)/label-latency
	@SENNIT_KUBE_BIN=$$(tests/kube/binaries.sh) SENNIT_BIN_DIR=$(CURDIR)/$(BIN) $(BIN)/tenant-latency

unit:            ## the tests that need neither root nor packages
	cargo test --locked --lib --bins -p mesh-keyring -p mesh-overlay -p mesh-policy -p mesh-agent -p mesh-wg -p sennit-bench

check:           ## formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

deny:            ## licences, sources and bans of the dependency tree (installs cargo-deny where it is missing)
	@command -v cargo-deny >/dev/null || cargo install cargo-deny --locked
	cargo deny check --hide-inclusion-graph licenses bans sources

bench: build     ## mesh-wg beside wireguard-go and boringtun (a quarter of an hour), and the plan of 1,000 nodes
	@tests/bench/peers.sh >/dev/null
	@SENNIT_BIN_DIR=$(CURDIR)/$(BIN) $(BIN)/meshbench run --date "$$(date -u +%Y-%m-%dT%H%M)" $(BENCH_ARGS)
	@tests/bench/plan.sh
	@tests/bench/paths.sh
	@tests/bench/policy.sh

conformance: setup ## the cases of public policy suites in ORACLES, against `policy evaluate` and with real packets (needs root, two minutes)
	@tests/policy/conformance.sh $(ORACLES)

fuzz:            ## fuzz each target for FUZZ_SECONDS (600)
	@tests/fuzz/run.sh

clean:
	cargo clean
