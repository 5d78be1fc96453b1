# make demo: install and run the demo.  make test: install and run the tests.  make help: the rest.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
OUT ?= demo-out
OTHER_TORCH ?= torch==2.13.0
WHEELS := build/wheels
OLDEST_TREE := build/oldest

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
DESCRIPTION := pyproject.toml setup.py CMakeLists.txt $(CONSTRAINTS) $(shell find csrc -type f)
# What compiling needs; torch among it, so that the libraries are built against the torch they run with.
BUILD_TOOLS := 'cmake>=3.25' 'ninja>=1.11' 'pybind11>=2.13' 'setuptools>=77' 'torch>=2.11'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-native test-other-torch test-extras test-oldest docs checkstyle clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(VENV)/.installed  ## create .venv and install the package with what the demo needs

demo: $(VENV)/.installed  ## ground three bundled clips, write a report, train a fresh tiny model for a minute
	$(BIN)/bridge-stg demo --out $(OUT)

test: $(VENV)/.installed-dev  ## install what the tests need and run them
	$(BIN)/python -m pytest -n 2

test-other-torch: $(VENV)/.installed-dev $(VENV)-other/.installed  ## the compiled library of one torch under another
	BRIDGE_STG_OTHER_PYTHON=$(abspath $(VENV)-other/bin/python) $(BIN)/python -m pytest tests/test_packaging.py -k other_torch

test-extras:  ## core, app and train in turn in one fresh environment, from a wheel built without flags; each does its main use
	rm -rf $(VENV)-extras $(WHEELS)
	$(PYTHON) -m venv $(VENV)-extras
	$(VENV)-extras/bin/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) torch
	$(VENV)-extras/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) .
	set -e; for extra in core app train; do \
	  $(VENV)-extras/bin/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) \
	    "$$(ls $(abspath $(WHEELS))/*.whl)$$(test $$extra = core || echo "[$$extra]")"; \
	  $(VENV)-extras/bin/python tests/check_extra.py $$extra; \
	done

# A copy of the tree: what is compiled in place here stays that of $(VENV). The CUDA library is built where nvcc is.
OLDEST_TESTS ?= tests/ops tests/models/test_video_processing.py
test-oldest: $(VENV)-oldest/.installed  ## the oldest releases that are declared: build, ops, the video processors, ground
	rm -rf $(OLDEST_TREE) && mkdir -p $(OLDEST_TREE)
	git ls-files --cached --others --exclude-standard | xargs -d '\n' cp --parents -t $(OLDEST_TREE)
	PATH="$(abspath $(VENV)-oldest/bin):$$PATH" TORCH_CUDA_ARCH_LIST=9.0 $(OLDEST_PIP) --no-build-isolation --editable '$(OLDEST_TREE)[app]'
	cd $(OLDEST_TREE) && $(abspath $(VENV)-oldest/bin/python) -m pytest $(OLDEST_TESTS)
	cd $(OLDEST_TREE) && TRITON_INTERPRET=1 $(abspath $(VENV)-oldest/bin/python) -m pytest tests/triton_kernels/interpreted/test_fullgraph.py

SANITIZED := build/sanitize
test-native: $(VENV)/.installed-dev  ## C++ unit tests and the CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DBRIDGE_STG_TESTS=ON -DBRIDGE_STG_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	$(BIN)/ctest --test-dir $(SANITIZED) --output-on-failure
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  BRIDGE_STG_LIBRARY_FOLDER=$(abspath $(SANITIZED)) $(BIN)/python -m pytest tests/ops/*/test_*_native.py

docs: $(VENV)-docs/.installed  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict

checkstyle: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-other $(VENV)-docs $(VENV)-extras $(VENV)-oldest build bridge_stg/lib bridge_stg/*.so dist *.egg-info $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bridge-stg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv module; install it (python3-venv)."; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(DESCRIPTION) | $(BIN)/python
	$(PIP) $(BUILD_TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[train]'
	@touch $@

$(VENV)/.installed-dev: $(DESCRIPTION) | $(BIN)/python
	$(PIP) $(BUILD_TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)-docs/.installed: mkdocs.yml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27' 'ruff>=0.12'
	@touch $@

$(VENV)-other/.installed: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-other
	$(VENV)-other/bin/python -m pip install --quiet $(OTHER_TORCH) numpy
	@touch $@

OLDEST_PIP := $(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt
$(VENV)-oldest/.installed: constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(OLDEST_PIP) $(BUILD_TOOLS) pytest hypothesis
	@touch $@
