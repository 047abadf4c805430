# Two commands matter: `make quickstart` (the whole method on this machine) and `make test` (the gate).
# Both set up .venv first; nothing has to be done before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# Test processes share the cores between them; without this each would start one thread per core.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# An interpreter that has everything of docs/gpu.md already; without one, .venv is made and used.
GPU_PYTHON ?=
GPU_TESTS = $$(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests) tests/gpu

.PHONY: help setup quickstart test test-slow test-parallel test-slurm test-gpu lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything that the tools and the tests need (once)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "error: '$(PYTHON)' was not found; name an interpreter: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else 1)' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); Python 3.11 or 3.12 is needed:" \
	       "make setup PYTHON=python3.11 (after removing .venv if it was made by another one)" >&2; exit 1; }
	@echo "[setup 1/3] virtual environment in $(VENV) ($$("$(PYTHON)" --version))"
	@"$(BIN)/python" -c '' 2> /dev/null || "$(PYTHON)" -m venv --clear "$(VENV)" || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "[setup 2/3] installing megatron_hydra and its pinned requirements; minutes on a slow network"
	@"$(BIN)/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "[setup 3/3] checking the environment"
	@"$(BIN)/python" -m pip check --disable-pip-version-check
	@touch "$@"

quickstart: setup ## the whole pipeline on a tiny model, on CPU; writes quickstart/
	"$(BIN)/python" tools/quickstart.py --output quickstart

test: setup lint ## the gate: lint, types, and the fast test suite
	$(TEST_ENV) "$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal

test-slow: setup ## the tests that take longer, except the parallel and SLURM suites
	$(TEST_ENV) "$(BIN)/python" -m pytest -m "slow and not parallel and not slurm" --timeout 1800

test-parallel: setup ## the whole parity suite: every layout against one rank
	$(TEST_ENV) "$(BIN)/python" -m pytest -m parallel --timeout 1800

test-slurm: setup ## jobs on a real SLURM on this host (root; apt-get install slurm-wlm munge)
	$(TEST_ENV) "$(BIN)/python" -m pytest -m slurm tests/slurm --timeout 900

test-gpu: $(if $(GPU_PYTHON),,setup) ## the public commands on this machine's GPUs; GPU_PYTHON=python3: without .venv
	@"$(or $(GPU_PYTHON),$(BIN)/python)" -m tests.gpu.ready
	$(TEST_ENV) "$(or $(GPU_PYTHON),$(BIN)/python)" -m pytest -o addopts= -o timeout=0 --import-mode=importlib \
	  -ra -v -m gpu $(GPU_TESTS)

lint: setup ## ruff (lint, format), mypy
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"

format: setup ## rewrite the sources as the linter wants them
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

clean: ## remove the environment, caches and the quickstart's output
	rm -rf "$(VENV)" quickstart gpu-report .pytest_cache .mypy_cache .ruff_cache .hypothesis build ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
