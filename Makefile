# Two commands matter: `make quickstart` (the whole method on this machine) and `make test` (the gate).
# Both set up .venv first; nothing has to be done before.

PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
# Pins every version that pip installs; empty: the newest of everything that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
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

# vLLM has requirements of its own. VLLM_VENV: where its environment is made; VLLM_PYTHON: an interpreter that has
# vLLM, pytest, pytest-timeout and this package already (a GPU machine's); without one, VLLM_VENV is made and used.
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON ?=
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_NEEDS := tests/serving/vllm/requirements.txt

.PHONY: help setup quickstart test test-fast test-py312 test-newest test-transformers test-slow test-parallel \
  test-slurm test-gpu test-releases test-vllm lint ruff format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything that the tools and the tests need (once)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "error: '$(PYTHON)' was not found; name an interpreter: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else 1)' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); Python 3.11, 3.12 or 3.13 is needed:" \
	       "make setup PYTHON=python3.11 (after removing $(VENV) if it was made by another one)" >&2; exit 1; }
	@echo "[setup 1/3] virtual environment in $(VENV) ($$("$(PYTHON)" --version))"
	@"$(BIN)/python" -c '' 2> /dev/null || "$(PYTHON)" -m venv --clear "$(VENV)" || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "[setup 2/3] installing megatron_hydra and its requirements" \
	  "($(or $(CONSTRAINTS),the newest of each)); minutes on a slow network"
	@"$(BIN)/python" -m pip install --disable-pip-version-check --editable '.[dev]' \
	  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
	@echo "[setup 3/3] checking the environment"
	@"$(BIN)/python" -m pip check --disable-pip-version-check
	@touch "$@"

quickstart: setup ## the whole pipeline on a tiny model, on CPU; writes quickstart/
	"$(BIN)/python" tools/quickstart.py --output quickstart

test: setup ruff ## the gate: lint, types, and the fast test suite
	@# mypy uses one core for most of a minute, so the tests begin beside it.
	@"$(BIN)/mypy" & types=$$!; status=0; \
	$(MAKE) --no-print-directory test-fast || status=$$?; \
	wait "$$types" || { echo "error: mypy found errors; its lines are above" >&2; status=1; }; \
	exit "$$status"

test-fast: setup
	$(TEST_ENV) "$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal

test-py312: ## the fast tests with Python 3.12 and the newest Megatron-Core, in .venv-py312
	$(MAKE) test-fast VENV=.venv-py312 PYTHON="$(PYTHON312)"

test-newest: ## the fast tests with the newest of every dependency, in .venv-newest
	rm -f .venv-newest/.installed
	$(MAKE) test-fast VENV=.venv-newest CONSTRAINTS= PYTHON="$(PYTHON)"
	.venv-newest/bin/python -m pip freeze --exclude-editable > .venv-newest/freeze.txt

# The oldest that is supported, the one that was on the GPU machines, and the newest.
TRANSFORMERS ?= 5.0.0 5.17.0 newest
LAID_OVER := .venv-transformers

test-transformers: setup ## the export's tests with other releases of transformers, each laid over .venv (250 MB)
	@mkdir -p $(LAID_OVER)
	@grep -viE '^(transformers|tokenizers|huggingface[_-]hub)==' constraints.txt > $(LAID_OVER)/constraints.txt
	@failed=; rm -f $(LAID_OVER)/*/result; \
	for version in $(TRANSFORMERS); do \
	  folder="$(CURDIR)/$(LAID_OVER)/$$version"; \
	  if [ "$$version" = newest ]; then rm -rf "$$folder"; wanted=transformers; else wanted="transformers==$$version"; fi; \
	  if [ ! -e "$$folder/.installed" ]; then \
	    rm -rf "$$folder"; \
	    "$(BIN)/python" -m pip install --disable-pip-version-check --quiet --target "$$folder" \
	      --constraint $(LAID_OVER)/constraints.txt "$$wanted"; \
	    touch "$$folder/.installed"; \
	  fi; \
	  over="$$folder$${PYTHONPATH:+:$$PYTHONPATH}"; \
	  found="$$(PYTHONPATH="$$over" "$(BIN)/python" -c 'import sys, transformers as t; \
	    sys.exit(f"not laid over: {t.__file__}") if sys.argv[1] not in t.__file__ else print(t.__version__)' "$$folder")"; \
	  echo "[transformers $$found]"; \
	  PYTHONPATH="$$over" $(TEST_ENV) "$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal tests/hf \
	    | tee "$$folder/log" || failed="$$failed $$found"; \
	  echo "transformers $$found: $$(tail -n 1 "$$folder/log")" > "$$folder/result"; \
	done; \
	cat $(LAID_OVER)/*/result; \
	if [ -n "$$failed" ]; then echo "error: failed with transformers$$failed" >&2; exit 1; fi

test-releases: setup ## one checkpoint, two Megatron-Cores (.venv, .venv-py312): the same bits, the same losses
	$(MAKE) setup VENV=.venv-py312 PYTHON="$(PYTHON312)"
	$(TEST_ENV) HYDRA_OTHER_PYTHON="$(CURDIR)/.venv-py312/bin/python" "$(BIN)/python" -m pytest -m slow \
	  --timeout 3600 tests/parallel/test_releases.py

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

test-vllm: $(if $(VLLM_PYTHON),,$(VLLM_STAMP)) ## exports in vLLM, in .venv-vllm (3.5 GB, made once; VLLM_VENV=DIR: elsewhere)
	$(TEST_ENV) HYDRA_REQUIRE=vllm "$(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python)" -m pytest --timeout 900 \
	  tests/serving

$(VLLM_STAMP): $(VLLM_NEEDS) pyproject.toml
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else 1)' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); vLLM's wheel wants Python 3.11 or 3.12:" \
	       "make test-vllm PYTHON=python3.11" >&2; exit 1; }
	@"$(VLLM_VENV)/bin/python" -c '' 2> /dev/null || "$(PYTHON)" -m venv --clear "$(VLLM_VENV)"
	"$(VLLM_VENV)/bin/python" -m pip install --disable-pip-version-check --requirement $(VLLM_NEEDS)
	@# They come along, built for another torch, and then break transformers' imports.
	"$(VLLM_VENV)/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
	"$(VLLM_VENV)/bin/python" -m pip install --disable-pip-version-check --no-deps --editable .
	@touch "$@"

lint: ruff ## ruff (lint, format), mypy
	"$(BIN)/mypy"

ruff: setup
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check

format: setup ## rewrite the sources as the linter wants them
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

clean: ## remove the environment, caches and the quickstart's output
	rm -rf .venv .venv-py312 .venv-newest .venv-vllm $(LAID_OVER) quickstart gpu-report .pytest_cache .mypy_cache .ruff_cache .hypothesis build ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
