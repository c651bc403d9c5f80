# `make help` lists what can be made.
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= digits
ARGS   ?=

TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP     = $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off
PYTEST  = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -q

# What the goals of this call need. They share one install, so that under `make -j` nothing runs
# while pip is still replacing it; a fuller install also stands for the lesser ones it covers.
NEED := $(if $(filter check lint types docs,$(MAKECMDGOALS)),dev,$(if $(filter test test-all,$(MAKECMDGOALS)),test,plain))
EXTRA_test   = [test]
EXTRA_dev    = [dev]
COVERS_plain = plain
COVERS_test  = plain test
COVERS_dev   = plain test dev

# An empty file stands for each finished step. It is touched last: an interrupted step leaves none.
MADE        = $(VENV)/.made
TORCH_READY = $(VENV)/.torch-$(TORCH)
READY       = $(VENV)/.ready-$(NEED)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check lint types docs clean

help:
	@echo "make demo    install, then run the demo board    (DATA=fashion-mnist: on clothes)"
	@echo "make test    install, then run the fast tests    (ARGS=\"-k rkd\" goes to pytest)"
	@echo "make check   lint, types, docs and every test, slow ones too"
	@echo "make lint    ruff"
	@echo "make types   mypy"
	@echo "make docs    the pages, into site/"
	@echo "make clean   remove caches and builds; $(VENV) and runs stay"
	@echo "The environment is $(VENV) (VENV=...), made by $(PYTHON) (PYTHON=...)."

# One thread: networks this small only lose by more.
demo: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/limbeck board recipes/demo$(if $(filter-out digits,$(DATA)),_$(DATA)).toml

test: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

check: lint types docs test-all

lint: $(READY)
	$(VENV)/bin/ruff check .

types: $(READY)
	$(VENV)/bin/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find limbeck tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "limbeck needs Python 3.11 or newer and '$(PYTHON)' is not one: name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks its venv module: install it (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "making the environment in $(VENV) ..."
	@$(PYTHON) -m venv "$(VENV)"
	@touch $@

# First and at its exact version: an open requirement may bring a newer build with gigabytes of CUDA.
$(TORCH_READY): $(MADE)
	@echo "installing torch $(TORCH) (the big one) ..."
	@$(PIP) torch==$(TORCH)
	@touch $@

$(READY): $(TORCH_READY) pyproject.toml constraints.txt
	@echo "installing limbeck$(EXTRA_$(NEED)) ..."
	@rm -f $(VENV)/.ready-*
	@$(PIP) -e ".$(EXTRA_$(NEED))" -c constraints.txt
	@touch $(COVERS_$(NEED):%=$(VENV)/.ready-%)
