# Two commands on a fresh machine: `make demo` shows the main job, `make test` passes the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := --constraint constraints.txt

.PHONY: demo serve test lint docs package clean

demo: $(VENV)/.demo
	$(BIN)/python -m example_apps.demo

serve: $(VENV)/.demo
	$(BIN)/python -m example_apps.demo --serve

test: $(VENV)/.test
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage report

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" pyright
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes session_plugin --ignoreexternal

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

package: $(VENV)/.package
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) dist site .coverage

$(VENV)/.pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --upgrade pip
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.docs $(VENV)/.package: $(VENV)/.%: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable . --group $*
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --group lint
	touch $@
