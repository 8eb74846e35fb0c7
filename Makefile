# Needs python3 (3.11 or later) with its venv module, and make. Everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH_VENV ?= .venv-bench
STOCK_VENV ?= .venv-stock
VERSIONS_VENVS ?= .venv-versions
PYTHONS ?= python3.11 python3.12 python3.13
BENCH_ARGS ?=
PROMPT ?= The capital of France is
PYTEST_ARGS ?=

export PROMPT

.DELETE_ON_ERROR:
.PHONY: help generate test nightly test-versions mutation bench docs notebooks lint types clean

help:
	@echo "make generate   write text with the default preset (PROMPT='...' to choose the prompt)"
	@echo "make test       see every kind of failure (PYTEST_ARGS='-m \"not real\"' for the fast tests)"
	@echo "make nightly    the same for all: every tiny config, stock files on all three backends"
	@echo "make mutation   put faults into the library: the property tests must see each"
	@echo "make test-versions  run quick tests with the oldest and newest versions (PYTHONS='python3.13')"
	@echo "make bench      measure against KerasHub, Transformers, ... (BENCH_ARGS='--help' for choices)"
	@echo "make docs       build the documentation's site into site/"
	@echo "make notebooks  run the notebooks and keep what they print and draw"
	@echo "make lint       ruff: rules and format"
	@echo "make types      mypy"
	@echo "make clean      remove $(VENV), and the other environments"

# Each stamp is made last, so that an install that was cut off starts again.
$(VENV)/installed-core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch on its own first: its plain version number lets pip take a CPU build where one is offered.
# KerasHub alone: its models need no TensorFlow, which it asks for.
$(VENV)/installed-dev: $(VENV)/installed-core
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'keras-hub>=0.32,<0.33'
	touch $@

# lm-evaluation-harness comes with 30 packages: only where all tests run.
$(VENV)/installed-eval: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[eval]'
	touch $@

# An environment of its own: KerasHub brings TensorFlow.
$(BENCH_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(BENCH_VENV)/bin/python -m pip install --quiet --editable '.[hub,bench]'
	touch $@

generate: $(VENV)/installed-core
	$(BIN)/python scripts/generate.py --prompt "$$PROMPT"

# Without this library: what `Backbone.save` writes must do without. tensorflow-text asks for the
# package tensorflow, which would take the place of the smaller one there.
$(STOCK_VENV)/installed: tests/stock_requirements.txt
	$(PYTHON) -m venv $(STOCK_VENV)
	$(STOCK_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(STOCK_VENV)/bin/python -m pip install --quiet --requirement tests/stock_requirements.txt
	$(STOCK_VENV)/bin/python -m pip install --quiet --no-deps tensorflow-text==2.21.1
	touch $@

# The pages and pictures of graphs are tested where there are Chromium and Graphviz (Debian:
# `apt-get install chromium graphviz`); FLM_CHROMIUM may name another program.
# One run, in two processes: tests/conftest.py puts the tests marked `real` last,
# and pytest-xdist is not to put the files in an order of its own. What waits for the night:
# tests/nightly.py.
nightly: CHOSEN := -m "nightly or not nightly"
nightly: $(VENV)/installed-eval
test nightly: $(VENV)/installed-dev $(STOCK_VENV)/installed
	FLM_STOCK_PYTHON=$(abspath $(STOCK_VENV))/bin/python \
		$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(CHOSEN) $(PYTEST_ARGS)

mutation: $(VENV)/installed-dev $(STOCK_VENV)/installed
	FLM_STOCK_PYTHON=$(abspath $(STOCK_VENV))/bin/python \
		$(BIN)/python -m pytest -n 2 -m mutation -rP tests/test_mutations.py $(PYTEST_ARGS)

# Needs no torch. A Python that is not there is left out, and said to be.
test-versions:
	$(PYTHON) tests/edges.py --environments $(VERSIONS_VENVS) $(PYTHONS)

bench: $(BENCH_VENV)/installed
	$(BENCH_VENV)/bin/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/installed-dev
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/python -m jupyter execute --inplace notebooks/*.ipynb

lint: $(VENV)/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/python -m mypy

clean:
	rm -rf site $(VENV) $(BENCH_VENV) $(STOCK_VENV) $(VERSIONS_VENVS)
