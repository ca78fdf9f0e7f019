# `make report` runs all the steps, `make test` the tests; each installs what it needs first.

PYTHON = python3
BIN = .venv/bin
DATA = auto

.PHONY: report test test-all coverage lint format clean

report: .venv/installed
	$(BIN)/python report.py --data "$(DATA)"

test: .venv/installed-dev
	$(BIN)/python -m pytest

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

coverage: .venv/installed-dev
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage report

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What can be made again; trained models and reviewed labels in results/ and report/ stay.
clean:
	rm -rf .venv .pytest_cache .ruff_cache

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
