# Every target sets itself up: `make quickstart`, `make test` or `make lint` on a fresh clone is enough.
PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

# MNIST: the variable ABSYNTH_DATA wins; otherwise a folder of it at hand; otherwise absynth downloads it.
ifndef ABSYNTH_DATA
ABSYNTH_DATA := $(firstword $(abspath $(wildcard ../shared/mnist data/mnist)))
endif
ifneq ($(ABSYNTH_DATA),)
export ABSYNTH_DATA
endif

.PHONY: help setup quickstart test test-docs lint format benchmark docs
help:
	@echo "make setup       install absynth and its tools into .venv"
	@echo "make quickstart  every model on digits and on noise, four under attack; a page and a report"
	@echo "make test        run the tests"
	@echo "make lint        ruff check, ruff format --check, mypy --strict"
	@echo "make docs        build the documentation into docs/_build/html, warnings are errors"
	@echo "make benchmark   speed against the paper's schedule, as ratios"
	@echo "make format      let ruff format the code and sort the imports"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "absynth needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/absynth quickstart $(ARGS)

# The pages' code blocks take longer than all other tests: `make test-docs` executes them.
test: $(STAMP)
	$(BIN)/python -m pytest --ignore tests/test_docs.py --numprocesses $(TEST_PROCESSES) --dist loadfile

test-docs: $(STAMP)
	$(BIN)/python -m pytest tests/test_docs.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(STAMP)
	$(BIN)/python benchmarks/run.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/trees docs docs/_build/html

format: $(STAMP)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
