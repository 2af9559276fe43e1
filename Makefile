# Targets that need the project's own environment build it first; ARGS is passed on, as in
#   make test ARGS="-k harness -n 0"

PYTHON ?= python3
VENV := .venv
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu lint benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## build .venv with the tested versions (PYTHON=python3.12 picks the interpreter)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e ".[dev,demo,examples,quantized]" -c constraints.txt
	@touch $@

demo: venv ## run the demo
	$(VENV)/bin/python -m bora_kernels.demo $(ARGS)

test: venv ## run the tests on all cores; without a CUDA device the kernels run in Triton's interpreter
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: ## run the tests marked gpu with the current python (PYTHON=...), on a CUDA machine
	$(PYTHON) -m pytest -m gpu $(ARGS)

lint: venv ## check style and formatting
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

benchmark: ## run the benchmarks with the current python (PYTHON=...), on a CUDA machine
	$(PYTHON) -m pytest benchmarks $(ARGS)

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
