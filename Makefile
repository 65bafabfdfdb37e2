# Two commands on a fresh machine: `make demo` shows the main job, `make test` passes the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS ?= 600
WORKERS ?= 4
CONSTRAINTS_FILE ?= constraints.txt
PACKAGE ?= --editable .
PARALLEL := --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
CONSTRAINTS := --constraint $(CONSTRAINTS_FILE)
test_IF_POSSIBLE = $(if $(shell command -v mariadb_config),--group mysqlclient)
test-core_IF_POSSIBLE = $(test_IF_POSSIBLE)

export PYTHONDONTWRITEBYTECODE =  # or each worker of a test run would compile all of the tests

.PHONY: demo serve check pytest test soak mutants matrix lint docs package bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m example_apps.demo

serve: $(VENV)/.demo
	$(BIN)/python -m example_apps.demo --serve

check: $(VENV)/.test  # the fast core, for while you work
	$(BIN)/python -m pytest --quick $(PARALLEL)

pytest:  # on what is installed, as .ci/matrix does
	$(BIN)/python -u -m pytest $(PARALLEL) $(ARGUMENTS)

test: $(VENV)/.test  # COVERAGE=1 shows which lines no test has run; it needs Python 3.12 or newer
ifdef COVERAGE
	$(BIN)/python -m coverage erase
	$(BIN)/python -u -m coverage run -m pytest $(PARALLEL)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report
else
	$(BIN)/python -u -m pytest $(PARALLEL)
endif

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --seconds $(SECONDS)

mutants: $(VENV)/.mutants  # hours; MODULES="scope/ending flask/plugin" are some of them
	$(BIN)/python -m tests.mutants $(MODULES)
	$(BIN)/python -m tests.mutants --wide $(MODULES)

matrix: package  # every Python and every set of versions that is claimed
	.ci/matrix

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" pyright
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes session_plugin --ignoreexternal

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

package: $(VENV)/.package
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

bench: $(VENV)/.test
	$(BIN)/python -m bench --size $(if $(QUICK),quick,full)

clean:
	rm -rf $(VENV) .matrix .mutants dist site .coverage

$(VENV)/.pip: $(CONSTRAINTS_FILE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --upgrade pip
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.test-core $(VENV)/.docs $(VENV)/.package: $(VENV)/.%: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) $(PACKAGE) --group $* $($*_IF_POSSIBLE)
	touch $@

$(VENV)/.lint $(VENV)/.mutants: $(VENV)/.%: $(VENV)/.test
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --group $*
	touch $@
