# Two commands do everything: `make report` runs all the steps, `make test` the tests.

PYTHON = python3
BIN = .venv/bin
DATA = auto

.PHONY: report test test-all lint format clean

report: .venv/installed
	@touch .venv/report-started
	$(BIN)/python inspectData.py --data $(DATA)
	$(BIN)/python evaluation.py --data $(DATA)
	$(BIN)/python label_errors.py --data $(DATA)
	$(BIN)/python training.py --data $(DATA) --recipe all
	$(BIN)/python training.py --data $(DATA) --show-mismatch
	$(BIN)/python lr_analysis.py --data $(DATA)
	$(BIN)/python adversarial.py --data $(DATA)
	@echo
	@echo "All steps are done. Figures and numbers:"
	@find results -type f -newer .venv/report-started | sort

test: .venv/installed-dev
	$(BIN)/python -m pytest

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv results

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
