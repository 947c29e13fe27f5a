# Everything a checkout can do. Each target sets up what it needs: Python >= 3.11 and make are enough.
#
#     make demo        the main job on the shipped model       make test        lint, types, levels, tests
#     make nano        train the shipped model again           make test-slow   the slow tests; 1,000 examples of each property
#     make test-e2e    real clients, a browser on the page     make soak        half an hour of mixed traffic on a server
#     make fuzz        ten minutes of fuzzing                  make bench-serving the server measured
#     make lint        only the checks                         make bench-check did a kernel become slower?
#     make clean       remove what these made                  make sanitize    kernel tests under sanitizers (gcc)
#     make paper       the paper's claims in small, 7 hours    (goes on where it was stopped)
#
# PYTHON=python3.12 picks the interpreter, WORKERS=4 the test processes, DEMO_ARGUMENTS="--tokens 16384" what `make demo` passes on,
# BENCH_ARGUMENTS=--update what `make bench-check` does.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
SOAK_ARGUMENTS ?= --minutes 30
SERVING_ARGUMENTS ?=
MINUTES ?= 10
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The stamps lie inside the environment, so removing it removes them.
RUNTIME := $(VENV)/.installed-runtime
DEVELOPMENT := $(VENV)/.installed-development
FUZZ := $(VENV)/fuzz

.PHONY: help demo test test-slow test-e2e lint nano paper fuzz soak bench-serving bench-check sanitize clean

help:
	@sed -n '3,12s/^# \{0,1\}//p' Makefile

demo: $(RUNTIME)
	@$(BIN)/indexshare demo $(DEMO_ARGUMENTS)

test: lint
	@echo "== tests"
	@$(BIN)/pytest --quiet --numprocesses $(WORKERS)

# Needs npm, and Debian's chromium (CHROMIUM= names another one). Clients go into folders of their own under .venv/e2e (3.6 GB);
# what cannot be installed is skipped, with the reason.
test-e2e: export E2E_INSTALL = 1
test-e2e: $(DEVELOPMENT)
	@$(PIP) --editable ".[server,train,dev,oracle,e2e]"
	@timeout 3600 $(BIN)/pytest --quiet -m slow tests/e2e

fuzz: $(FUZZ)/atheris
	@PYTHONPATH=tests:$(FUZZ) nice $(BIN)/python -m fuzz.run --minutes $(MINUTES)

$(FUZZ)/atheris: | $(DEVELOPMENT)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(FUZZ) atheris==3.0.0

test-slow: $(DEVELOPMENT)
	@$(BIN)/pytest --quiet --numprocesses $(WORKERS) -m 'slow or hypothesis' --hypothesis-profile explore

lint: $(DEVELOPMENT)
	@echo "== lint, format, types, levels"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/pyrefly check --summary=none
	@$(BIN)/lint-imports --no-cache > $(VENV)/levels.txt || { cat $(VENV)/levels.txt; exit 1; }

# glibc keeps large blocks between steps instead of asking the system for fresh pages (docs/experiments.md).
nano paper: export MALLOC_MMAP_THRESHOLD_ = 8589934592
nano paper: export MALLOC_TRIM_THRESHOLD_ = 17179869184
nano paper: export MALLOC_TOP_PAD_ = 67108864
nano: $(RUNTIME)
	@$(BIN)/indexshare train nano
	@$(BIN)/indexshare train nano-long
	@$(BIN)/indexshare train nano-longest
	@$(BIN)/indexshare eval runs/nano-longest/model --dense-up-to 131072

paper: $(RUNTIME)
	@$(BIN)/python benchmarks/paper_table.py --output runs/paper --write docs/indexshare.md

soak: $(DEVELOPMENT)
	@$(BIN)/python benchmarks/soak.py $(SOAK_ARGUMENTS)

bench-serving: $(DEVELOPMENT)
	@$(BIN)/python benchmarks/serving.py $(SERVING_ARGUMENTS)

bench-check: $(DEVELOPMENT)
	@$(BIN)/python benchmarks/bench_check.py $(BENCH_ARGUMENTS)

# The tests that end in the C++ code, with kernels of every instruction set built for it in a cache of their own. Not those about
# building itself. Output is not captured: a finding ends the process, and its report must not be lost.
sanitize: export CXX = $(CURDIR)/tests/kernels/sanitizing_compiler
sanitize: export INDEXSHARE_CACHE = $(CURDIR)/.kernels_cache/sanitized
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export UBSAN_OPTIONS = print_stacktrace=1
sanitize: $(DEVELOPMENT)
	@$(BIN)/python -c "from indexshare.kernels import native; list(map(native.build, native.runnable()))"
	@LD_PRELOAD=$$(gcc -print-file-name=libasan.so) $(BIN)/pytest --quiet --exitfirst --capture=no --timeout 900 -k "not build and not compiler" \
	  tests/kernels/test_native.py tests/kernels/test_packed.py tests/kernels/test_index_select.py tests/kernels/test_pool.py tests/kernels/test_training_operations.py tests/model/test_native.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "indexshare needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2> /dev/null || echo missing). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python could not create an environment; on Debian and Ubuntu install the package python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing torch (the large part; once)"
	@$(PIP) torch
	@echo "== installing indexshare"
	@$(PIP) --editable ".[server]"
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	@echo "== installing the development tools and the reference implementation"
	@$(PIP) --editable ".[server,train,dev,oracle]"
	@touch $@
