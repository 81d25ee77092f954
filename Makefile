# On a fresh Debian 12 with root and Rust: `make demo` and `make test` install what is missing and do the rest.
.PHONY: help setup build demo compare report targets test lint doc fuzz zdtm soak fault-matrix

export POSTCOPY_CRIU := $(CURDIR)/.deps/criu/bin/criu
CARGO ?= cargo
MEMORY ?= 512
REPEAT ?= $(if $(filter soak,$(MAKECMDGOALS)),50,3)
SECONDS ?= 60
OUT ?= report

help:
	@echo 'make demo     a running redis moves to another host and its client never disconnects (MEMORY=$(MEMORY) MiB)'
	@echo 'make compare  the same beside CRIU'"'"'s own lazy-pages (MEMORY=$(MEMORY) REPEAT=$(REPEAT))'
	@echo 'make report   everything side by side, one page; half an hour for each repeat (REPEAT=$(REPEAT) OUT=$(OUT))'
	@echo 'make targets  every target in one table, met or not; half an hour (REPEAT=$(REPEAT))'
	@echo 'make test     every check and every test'
	@echo 'make fuzz     every decoder under libFuzzer (SECONDS=$(SECONDS) each; needs cargo-fuzz)'
	@echo 'make zdtm     CRIU'"'"'s own tests through the pair and through CRIU'"'"'s daemons (ZDTM_MODE, ZDTM_TESTS; an hour)'
	@echo 'make soak     one workload moves there and back REPEAT (50) times, and nothing leaks'
	@echo 'make fault-matrix  every state of a migration and everything that can be killed or cut in it, as a table'
	@echo 'make build    the programs, in target/release'
	@echo 'make setup    what all of this needs: packages, and CRIU into .deps/criu'

# Each package is installed only when a program it brings is missing.
setup:
	@tests/install-packages
	@scripts/install-criu .deps/criu

build:
	$(CARGO) build --release --locked --bins

demo: setup build
	target/release/bench demo --memory $(MEMORY) $(if $(JSON),--json $(JSON))

compare: setup build
	target/release/bench compare --memory $(MEMORY) --repeat $(REPEAT) $(if $(JSON),--json $(JSON))

report: setup build
	target/release/bench report --repeat $(REPEAT) --out $(OUT) $(if $(ONLY),--only '$(ONLY)')

targets: setup build
	target/release/bench targets --repeat $(REPEAT) $(if $(JSON),--json $(JSON)) $(if $(ONLY),--only '$(ONLY)')

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked

# The programs are built first: the end-to-end tests start them as an operator does.
test: setup lint doc
	$(CARGO) build --workspace --bins --locked
	@if $(CARGO) nextest --version >/dev/null 2>&1 || tests/install-nextest; then \
	  $(CARGO) nextest run --workspace --locked && $(CARGO) test --workspace --doc --locked; \
	else \
	  echo 'make: cargo-nextest is not to be had here; tests run one after the other' >&2; \
	  $(CARGO) test --workspace --locked -- --test-threads 1; \
	fi

# The short run is part of `make test` (tests/fuzzing); this one goes on where it ended, in fuzz/corpus. The sanitizer is a
# nightly feature, which RUSTC_BOOTSTRAP allows to the compiler there is.
fuzz:
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo 'make: `cargo install cargo-fuzz` is needed' >&2; exit 1; }
	$(CARGO) run -p fuzzing --bin fuzz-corpus --locked -- fuzz/corpus
	@cd fuzz && for target in $$(ls fuzz_targets | sed 's/[.]rs$$//'); do \
	  RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target -- -max_total_time=$(SECONDS) || exit 1; \
	done

# Few moves are part of `make test`.
soak: setup
	$(CARGO) build --workspace --bins --locked
	REPEAT=$(REPEAT) $(CARGO) test -p tests --test soak --locked -- --nocapture

# Part of `make test` too.
fault-matrix: setup
	$(CARGO) build --workspace --bins --locked
	$(CARGO) test -p tests --test fault_matrix --locked -- --nocapture

# CRIU's own test suite is fetched at run time and judges both daemons; not part of `make test`.
zdtm: setup build
	scripts/zdtm .deps/zdtm $(POSTCOPY_CRIU) target/release $(ZDTM_TESTS)
