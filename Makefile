# Everything happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# torch goes first and by its exact version: an unpinned torch would draw gigabytes of CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test lint types docs bench clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: .venv/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

docs: .venv/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/models --write-models-table

bench: .venv/.test
	$(BIN)/poolhouse bench

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .coverage

.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[test,clients,lint]'
	touch $@
