# Two commands matter: `make demo` and `make test`. Both set up .venv first, where needed.
# A virtual environment that happens to be active is not used.

PYTHON ?= python3
BUDGET ?= 5m
BIN    := .venv/bin
STAMP  := .venv/.stamp
PIP     = $(BIN)/python -m pip --disable-pip-version-check
# Tests that stand together stay together, for what they share, until a process has none left.
PYTEST  = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

unexport VIRTUAL_ENV
unexport PYTHONHOME
# Else every process of the tests compiles all modules anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo compare test quick dear lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with the tested versions of everything

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; exactflow needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: exactflow needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	       "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> set-up (.venv, some minutes the first time)"
	@$(PYTHON) -m venv .venv || { \
	  echo "error: $(PYTHON) -m venv failed (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PIP) install -q --retries 10 --timeout 60 -c constraints.txt -e '.[all,dev,docs]'
	@touch $@

demo: $(STAMP) ## train, score and sample a small flow on built-in images (writes runs/demo/)
	@$(BIN)/exactflow demo

compare: $(STAMP) ## train and compare all families, BUDGET=5m each (writes runs/compare/)
	@EXACTFLOW_DATA=$${EXACTFLOW_DATA:-$(wildcard ../shared/data)} \
	  $(BIN)/python benchmarks/compare.py --budget $(BUDGET)

test: lint ## lint, then all tests but the dear ones
	@echo "==> pytest"
	@$(PYTEST) --costs 15

quick: $(STAMP) ## the tests that take a moment each, for the daily round
	@$(PYTEST) -m "not slow"

dear: $(STAMP) ## what a step of the deepest recipes costs: minutes, left out of `make test`
	@$(PYTEST) -m dear tests/test_recipes.py

lint: $(STAMP) ## style, format, types and the order of imports
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> basedpyright"
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@echo "==> lint-imports"
	@$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## build the documentation site (writes build/docs/)
	@$(BIN)/sphinx-build -W --keep-going -q docs build/docs
	@echo "open build/docs/index.html"

clean: ## remove caches and builds (keeps .venv and runs/)
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
