# Targets that need the project's own environment build it first; ARGS is passed on, as in
#   make test ARGS="-k harness -n 0"

PYTHON ?= python3
VENV := .venv
EXTRAS := dev,demo,docs,examples,quantized
ARGS ?=
# Files in their own order: by default those with the fewest tests come last, among them the longest, and one core waits.
XDIST := -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv demo docs test test-newest test-oldest test-gpu lint types dist benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## build .venv with the tested versions (PYTHON=python3.12 picks the interpreter)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --no-compile -e ".[$(EXTRAS),integrations]" -c constraints.txt
	@# as pip would, but on all cores; packages may hold files that this Python does not take
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: venv ## run the demo
	$(VENV)/bin/python -m examples.demo $(ARGS)

docs: venv ## build the documentation site in site/; every warning is an error, such as a broken link
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m mkdocs build --strict $(ARGS)

test: venv ## run the tests on all cores; without a CUDA device the kernels run in Triton's interpreter
	$(VENV)/bin/python -m pytest $(XDIST) $(ARGS)

test-newest: $(VENV)-newest/.installed ## run the tests with the newest versions of everything, in .venv-newest
	$(VENV)-newest/bin/python -m pytest $(XDIST) $(ARGS)

$(VENV)-newest/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --upgrade --upgrade-strategy eager -e ".[$(EXTRAS),integrations]"
	@touch $@

test-oldest: $(VENV)-oldest/.installed ## run the tests with the oldest versions that pyproject.toml admits, in .venv-oldest
	$(VENV)-oldest/bin/python -m pytest -n auto --dist loadfile $(ARGS)

$(VENV)-oldest/.installed: pyproject.toml setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -e ".[$(EXTRAS)]" -c constraints-oldest.txt
	@touch $@

test-gpu: ## run the tests marked gpu with the current python (PYTHON=...), on a CUDA machine
	$(PYTHON) -m pytest -m gpu $(ARGS)

lint: types ## check style, formatting and types
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

types: venv ## check types alone
	$(VENV)/bin/python -m mypy

benchmark: venv ## run the benchmarks, on a CUDA machine; with a python of your own: python -m pytest benchmarks
	$(VENV)/bin/python -m pytest benchmarks $(ARGS)

dist: venv ## build the sdist and the wheel in dist/
	$(VENV)/bin/python -m pip wheel --no-deps --wheel-dir dist .
	$(VENV)/bin/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

clean: ## remove the environments, builds and caches
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
