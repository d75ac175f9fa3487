# Everything runs in .venv, which is made from pyproject.toml and constraints.txt alone: a fresh machine needs
# Python (>= 3.10) and make.
#
#   make test PYTHON=python3.12       another interpreter
#   make test PYTEST_ARGS="-k fold"   some of the tests
#
# pip takes PyPI's torch, which on Linux brings several GB of CUDA. The CPU build instead:
#
#   make test PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"
#
# (--index-url works too where that index holds every pinned version; PIP_EXTRA goes to each pip call.)

PYTHON ?= python3
PIP_EXTRA ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_EXTRA) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv check test integrations lint demo docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP)  ## create .venv with the package, its tools, torchvision, timm and opacus

# The stamp is touched last, so an interrupted installation is taken up again.
# torch goes first, with nothing beside it that could choose another build. torchvision, timm and opacus go without
# their dependencies, because torchvision pins a torch of its own; what they need besides it is named here.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "normswap needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable ".[test,docs]"
	$(PIP_INSTALL) --no-deps torchvision timm opacus
	$(PIP_INSTALL) pillow pyyaml huggingface_hub opt_einsum
	@touch $@

check: lint  ## lint, then run the fast tests: before each commit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST_ARGS)

test: lint  ## lint, then run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

integrations: venv  ## install the training loops of others into .venv, then run their tests
	$(PIP_INSTALL) --editable ".[integrations]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_integrations.py $(PYTEST_ARGS)

lint: venv  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: venv  ## convert a small network, fold it, export it, verify it
	$(BIN)/normswap demo

# The variable silences an announcement of mkdocs-material about other versions.
docs: venv  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# setuptools packs whatever an earlier build left in build/, deleted modules included.
wheel: venv  ## build dist/normswap-*.whl
	rm -rf build dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .
	@rm -rf build
	@ls dist/*.whl

clean:  ## remove .venv, builds and caches
	rm -rf .venv build dist site *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
