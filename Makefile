# Everything happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# torch goes first and by its exact version: an unpinned torch would bring gigabytes of CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)
# Compiled at install; the name of a library holds a hash of these.
KERNELS := $(wildcard src/poolhouse/kernels/*.cpp src/poolhouse/kernels/*.h) src/poolhouse/kernels/build.py
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: demo quick check test test-browser test-scale test-stores site lint types slow docs bench clean

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

# The recipes of docs/scale.md under Ray, Spark, Daft and Dask, and the loaders of databases. Spark needs Java.
test-scale: .venv/.scale
	HF_HUB_OFFLINE=1 .venv/scale/bin/python -m pytest -q tests/scale

# The Python of the pages about vector stores and frameworks, with their clients.
test-stores: .venv/.stores
	HF_HUB_OFFLINE=1 .venv/stores/bin/python -m pytest -q tests/stores

# The documents as a site, in site/: a broken link fails.
site: .venv/.site
	.venv/site/bin/python -m tests.docs.site build/site
	.venv/site/bin/zensical build --strict --clean

# The page in a real browser: CHROMIUM names one that is not on the path.
CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))
test-browser:
	@test -n "$(CHROMIUM)" || { echo "There is no browser: apt-get install chromium, or make test-browser CHROMIUM=/path/to/chrome."; exit 1; }
	@command -v curl > /dev/null || { echo "There is no curl, which the page's examples use: apt-get install curl."; exit 1; }
	@$(MAKE) --no-print-directory .venv/.browser
	$(PYTEST) -q tests/browser --browser $(CHROMIUM)

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
	rm -rf .venv site build/site .cache .pytest_cache .ruff_cache .mypy_cache .coverage

.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	touch $@

.venv/.demo: .venv/.torch pyproject.toml hatch_build.py $(KERNELS)
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(BIN)/poolhouse download demo
	touch $@

.venv/.test: .venv/.torch pyproject.toml hatch_build.py $(KERNELS)
	$(PIP) install -c constraints.txt -e '.[test,clients,deploy,lint]'
	$(BIN)/poolhouse download demo
	touch $@

# Each lies on top of .venv, whose packages it sees, with those of the extra of its name.
.venv/.scale .venv/.stores: .venv/.%: .venv/.test
	$(BIN)/python -m venv .venv/$*
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
		"$$(.venv/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	.venv/$*/bin/pip --disable-pip-version-check --quiet install -c constraints.txt 'poolhouse[$*]'
	touch $@

# About 100 MB, and nothing of Poolhouse.
.venv/.site: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv/site
	.venv/site/bin/pip --disable-pip-version-check --quiet install -c constraints.txt "$$(sed -n 's/^site = \["\(.*\)"\]$$/\1/p' pyproject.toml)"
	touch $@

.venv/.browser: .venv/.test
	$(PIP) install -c constraints.txt -e '.[browser]'
	touch $@
