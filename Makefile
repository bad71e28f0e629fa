# Each target goes from a bare clone to its result: it makes .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test lint bench soak wheel clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Metafleet, torch and Ray into $(VENV) (several GB the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(INSTALLED) ## make .venv and install into it

train: $(INSTALLED) ## meta-train MAML on the embedded glyphs, on all local cores
	@$(BIN)/metafleet train

test: $(INSTALLED) ## run all tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --ignore tests/system
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/system

lint: $(INSTALLED) ## style, types and import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(INSTALLED) ## measure speed side by side; run nothing else meanwhile
	@$(BIN)/python -m benchmarks

soak: $(INSTALLED) ## kill workers and drivers for half an hour (METAFLEET_SOAK_MINUTES) and compare the bits
	@$(BIN)/python -m pytest -m soak tests/system/test_soak.py -s

wheel: $(INSTALLED) ## build a wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls -t dist/*.whl | head -1

clean: ## remove .venv and build products
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
