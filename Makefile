# `make report` runs all the steps, `make test` the tests; each installs what it needs first.

PYTHON = python3
BIN = .venv/bin
DATA = auto

.PHONY: report test test-all test-oldest fuzz coverage lint format clean

report: .venv/installed
	$(BIN)/python report.py --data "$(DATA)"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n auto -m "slow or not slow"

# All tests, with the oldest versions that requirements*.txt allow.
test-oldest: .venv-oldest/installed-dev
	.venv-oldest/bin/python -m pytest -n auto -m "slow or not slow"

fuzz: .venv/installed-dev
	FUZZ_CASES=10000 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

coverage: .venv/installed-dev
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What can be made again; trained models and reviewed labels in results/ and report/ stay.
clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .coverage*

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

.venv-oldest/installed-dev: requirements.txt requirements-dev.txt constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -r requirements-dev.txt -c constraints-oldest.txt
	touch $@
