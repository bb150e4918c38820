# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: demo test chaos check format clean

demo: $(VENV)/.installed
	$(BIN)/rayclust demo --out demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Seeded accidents beyond those of the tests: make chaos N=500 FIRST=1000
N ?= 200
FIRST ?= 0
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos $(N) $(FIRST)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The constraints pin what CI runs; they name no index, so pip's own settings decide where packages come from.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
