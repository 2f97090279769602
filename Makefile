# Two commands: make demo, make test. Each makes its own .venv, installs, builds and runs.
#
# PYTHON   the interpreter to make .venv from (3.11 or 3.12)
# JOBS     parallel test processes and compile jobs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
export MAX_JOBS ?= $(JOBS)
PYTEST := $(BIN)/python -m pytest -q
# Installed without dependencies: curvlinops asks for backpack, that for torchvision, and that for
# another torch. backpack serves its experimental features only; the others are what it imports.
REFEREES := curvlinops-for-pytorch einconv einops linear_operator scipy
# what runs on every back end
OP_TESTS := tests/softmax_fisher tests/head_fisher tests/covariance tests/operators

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A CUDA torch that is already importable is kept (it is gigabytes, and matches the driver);
# otherwise the CPU build of 2.13.0, and the Triton whose interpreter and compiler need no GPU.
$(VENV)/torch:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
	  echo "setting up $(VENV) around the CUDA torch of this machine"
	  $(PYTHON) -m venv --system-site-packages $(VENV)
	else
	  echo "setting up $(VENV) with torch 2.13.0"
	  $(PYTHON) -m venv $(VENV)
	  $(PIP) -c constraints.txt torch==2.13.0 numpy setuptools wheel ninja
	  $(PIP) --no-deps triton==3.9.0
	fi
	touch $@

# Without a CUDA torch, nvcc alone still compiles and links the CUDA sources, so that they are proved.
$(VENV)/dev: $(VENV)/torch pyproject.toml constraints.txt setup.py $(SOURCES)
	@echo "installing fisherkern[dev]"
	if [ -z "$${FISHERKERN_CUDA:-}" ] && command -v nvcc >/dev/null; then export FISHERKERN_CUDA=link; fi
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps $(REFEREES)
	$(BIN)/python -c 'import curvlinops'
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml constraints.txt setup.py $(SOURCES)
	@echo "installing fisherkern[demo]"
	if [ -f $(VENV)/dev ]; then touch $@; exit 0; fi
	$(PIP) -c constraints.txt --no-build-isolation -e '.[demo]'
	touch $@

demo: $(VENV)/demo ## Fisher information of a real language model: table, text and plot
	@$(BIN)/fisherkern demo $(DEMO)

test: lint types test-cpu test-triton test-cuda test-docs ## Everything that can be proved without a GPU
	@echo "all test targets passed"

lint: $(VENV)/dev ## ruff, with docstring rules
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev ## mypy
	@$(BIN)/mypy -p fisherkern
	$(BIN)/mypy --explicit-package-bases setup.py csrc/build.py

test-cpu: $(VENV)/dev ## Reference and C++ back ends, bench, demo, packaging
	@$(PYTEST) -n $(JOBS) --dist worksteal

test-triton: $(VENV)/dev ## Triton kernels in the interpreter, on the same op tests
	@TRITON_INTERPRET=1 FISHERKERN_TEST_BACKENDS=triton $(PYTEST) -n $(JOBS) --dist worksteal $(OP_TESTS)

test-cuda: $(VENV)/dev ## CUDA sources emulated on the host, on the same op tests
	@FISHERKERN_TEST_BACKENDS=emulated $(PYTEST) -n $(JOBS) --dist worksteal $(OP_TESTS)

test-docs: $(VENV)/dev ## Doctests of code and prose, and the docs build
	@$(PYTEST) --doctest-modules --doctest-glob='*.md' --ignore=docs/_build fisherkern README.md docs
	$(MAKE) --no-print-directory docs

docs: $(VENV)/dev ## Build docs/_build
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

bench: $(VENV)/dev ## fisherkern bench; BENCH='--device cuda' and the like
	@$(BIN)/fisherkern bench softmax_fisher $(BENCH)

gpu: ## The op tests and benches on a CUDA device; results in bench/results
	@PYTHON=$(PYTHON) bash bench/gpu.sh

clean: ## Remove .venv and everything built
	@rm -rf $(VENV) build dist docs/_build *.egg-info fisherkern/*.so

.PHONY: help demo test lint types test-cpu test-triton test-cuda test-docs docs bench gpu clean
