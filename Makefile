# make demo: install and run the demo.  make test: install and run the tests.  make help: the rest.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
OUT ?= demo-out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
DESCRIPTION := pyproject.toml setup.py $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help install demo test checkstyle clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv and install the package with what the demo needs

demo: $(VENV)/.installed  ## ground three bundled clips, write a report, train a fresh tiny model for a minute
	$(BIN)/bridge-stg demo --out $(OUT)

test: $(VENV)/.installed-dev  ## install what the tests need and run them
	$(BIN)/python -m pytest -n 2

checkstyle: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bridge-stg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv module; install it (python3-venv)."; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(DESCRIPTION) | $(BIN)/python
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.installed-dev: $(DESCRIPTION) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
