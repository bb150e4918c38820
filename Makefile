# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
PARTS ?=

.PHONY: demo test bench bench-gpu chaos check docs audit format clean

demo: $(VENV)/.runs
	$(BIN)/rayclust demo --out demo

# Two processes: one takes the two groups of tests with Ray, the other all else, file by file (tests/conftest.py). With a
# third the tests that kill processes run out of their time on two cores.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

# What a run costs beside faiss and the published forms, in less than 30 minutes on two idle cores; one part of it with
# make bench PARTS=neighbors.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/suite.py $(PARTS)

# Everything that one GPU can measure below Ray, in less than six minutes.
bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The documentation as a site, in site/.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Known holes of the pinned packages, by the advisories of the day: asks the network, so CI does without.
audit:
	test -x $(VENV)-audit/bin/pip-audit || ($(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install --quiet pip-audit)
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The constraints pin what CI runs; they name no index, so pip's own settings decide where packages come from.
$(VENV)/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	touch $@

# What tests and checks need besides.
$(VENV)/.installed: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit build site demo
