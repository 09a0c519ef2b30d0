# Everything happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# torch goes first and by its exact version: an unpinned torch would bring gigabytes of CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)
# Compiled at install; the name of a library holds a hash of these.
KERNELS := $(wildcard src/poolhouse/kernels/*.cpp src/poolhouse/kernels/*.h) src/poolhouse/kernels/build.py
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: demo quick check test lint types slow docs bench clean

# Search a small corpus from Python and over HTTP.
demo: .venv/.demo
	$(BIN)/python examples/demo.py

# The tests that take no long time, without coverage: under four minutes on two cores.
quick: .venv/.test
	$(PYTEST) -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile

# Before a commit.
check: lint types quick

# All tests, with coverage.
test: .venv/.test
	$(PYTEST) -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

# Measure again which tests take long, and write them into tests/slow.txt.
slow: .venv/.test
	$(PYTEST) -q -n auto --maxprocesses 8 --dist loadfile --write-slow

# Write what the documents take from the code: the file map, and the measured parity.
docs: .venv/.test
	$(BIN)/python -m tests.docs.written
	$(PYTEST) -q tests/models --write-models-table

# Speed beside sentence-transformers; PEERS names an environment with more peers.
bench: .venv/.test
	$(BIN)/poolhouse bench $(if $(PEERS),--peers $(PEERS))

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .coverage

.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	touch $@

.venv/.demo: .venv/.torch pyproject.toml hatch_build.py $(KERNELS)
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(BIN)/poolhouse download demo
	touch $@

.venv/.test: .venv/.torch pyproject.toml hatch_build.py $(KERNELS)
	$(PIP) install -c constraints.txt -e '.[test,clients,lint]'
	$(BIN)/poolhouse download demo
	touch $@
