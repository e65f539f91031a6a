# mayu: every pod in its own microVM. `make demo` and `make test` need nothing to be done first.
#
#   make demo      run a container in a microVM and show what happened
#   make test      every check and every test, the end-to-end ones on a real containerd and a real KVM
#   make check     formatting, lints, dependencies
#   make unit      the tests that need no virtual machine
#   make fuzz      made-up input to all that hears from outside (TARGET=<name> is one of tests/fuzz, FUZZ_SECONDS=60 for each)
#   make e2e       the end-to-end tests in the lab (E2E=<part of a name> runs only those)
#   make soak      a thousand pods, ten thousand execs in one, and five minutes under attack: hours in the lab
#   make bench     measure times and memory, in counted instructions, and put them into the documents (BENCH=<part>: only that)
#   make times     hold a few times, which repeat exactly, against tests/lab/records.json; `make test` does
#   make records   renew tests/lab/records.json
#   make guest     the guest kernel and the guest image
#   make lab       a shell in the lab (Ctrl-A X leaves)
#   make install   install everything for this host's containerd (DESTDIR and PREFIX as usual)
#   make uninstall remove it again; refuses while pods run (FORCE=yes does not)
#   make node-image  the image that installs mayu on the nodes of a Kubernetes cluster (IMAGE=<name>)
#   make clean     remove what was built in the tree (the cache stays: see MAYU_CACHE)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check unit fuzz fuzz-short e2e soak bench times records guest lab install uninstall node-image clean deps build payload \
    lint fmt

PROFILE ?= release
PREFIX ?= /usr
DESTDIR ?=
FORCE ?=
IMAGE ?= mayu-node:latest
CONTAINERD ?= 1.7 2.1 2.1/sandbox
E2E ?=
BENCH ?= start data idle pods functions requests-2.1 requests-1.7
FUZZ_SECONDS ?= 60
TARGET ?=

export PATH := $(HOME)/.cargo/bin:$(PATH)

target := $(or $(CARGO_TARGET_DIR),target)
triple := x86_64-unknown-linux-gnu
agent = $(target)/$(triple)/$(PROFILE)/mayu-agent
payload := $(target)/payload
results := $(target)/results

demo: payload
	tests/lab/run --payload $(payload) --results $(results)/demo --memory 3072 -- ./lab/demo

# The times are last in the queue of labs: by then one processor waits for the other's tests.
test: held := times
test: check unit fuzz-short e2e

lint check: deps
	cargo fmt --all --check
	rustfmt --edition 2024 --check tests/hostile-guest/main.rs
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --manifest-path tests/fuzz/Cargo.toml --target-dir $(target)/fuzz --locked -- -D warnings
	scripts/cargo-deny check --hide-inclusion-graph bans licenses sources

unit: deps
	cargo test --workspace --exclude mayu-e2e --locked
	tests/packaging/run

fuzz-short: FUZZ_SECONDS = 10
fuzz fuzz-short: deps
	tests/fuzz/run $(target)/fuzz $(results)/fuzz $(FUZZ_SECONDS) $(TARGET)

# The quicker build: behaviour is in question here, and `make bench` measures the real one.
e2e soak lab times records: PROFILE := lab

e2e: payload
	tests/lab/e2e $(payload) $(results)/e2e "$(CONTAINERD) $(held)" $(E2E)

soak: payload
	MAYU_TEST_PODS=1000 MAYU_TEST_EXECS=10000 MAYU_TEST_HOSTILE_SECONDS=300 MAYU_LAB_TIMEOUT=14400 \
	    tests/lab/e2e $(payload) $(results)/soak 2.1 one_after_another hundred_execs attack

bench: payload
	tests/lab/bench $(payload) $(results)/bench $(BENCH)
	for part in $(BENCH); do cp $(results)/bench/$$part/measurements.jsonl docs/measurements/$$part.jsonl; done
	scripts/bench-report
	tests/lab/bench --wall-clock $(payload) $(results)/bench-wall-clock $(BENCH)

times records: payload
	tests/lab/bench $(payload) $(results) times
	tests/lab/compare-times $(results)/times $(if $(filter records,$@),--renew)

lab: payload
	tests/lab/shell --payload $(payload)

# Everything that runs in the lab, laid out as on a node, with the tests beside it.
payload: build guest
	scripts/payload $(payload) $(PROFILE)

build: deps
	cargo build --locked --profile $(PROFILE) -p mayu -p mayu-shim
	scripts/build-static $(PROFILE)

guest: build
	rootfs/build-kernel > /dev/null
	rootfs/build-image $(agent) > /dev/null

install: build guest
	scripts/install $(PROFILE) "$(DESTDIR)" "$(PREFIX)"

uninstall:
	FORCE=$(FORCE) scripts/uninstall "$(DESTDIR)" "$(PREFIX)"

node-image: build guest
	scripts/node-image $(PROFILE) "$(IMAGE)"

deps:
	@[[ -n "$${MAYU_SKIP_DEPS:-}" ]] || scripts/deps

fmt:
	cargo fmt --all

clean:
	rm -rf $(target)
