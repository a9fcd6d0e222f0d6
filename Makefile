# Two commands: `make demo` and `make test`. Both make .venv by themselves and are quick the second time.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-fast lint types format docs clean

demo: .venv/installed
	$(BIN)/firth demo

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-fast: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "not slow"

lint: .venv/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/installed-test
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch goes first and by its exact version: a loose requirement would pull gigabytes of another build.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "firth needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@

docs: .venv/installed
	$(PIP) --editable '.[docs]'
	$(BIN)/python docs/write_reference.py
	$(BIN)/zensical build

clean:
	rm -rf .venv demo runs site
