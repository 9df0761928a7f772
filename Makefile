# Every target works alone on a machine with make and Python 3.11 or newer:
# it first creates .venv and installs what it needs there.

PYTHON ?= python3
WORKERS ?= 2
TESTFLAGS ?=
DEV_EXTRAS ?= all,docs,test
# The wheels installed here are the CPU ones; JAX should not look for another device.
export JAX_PLATFORMS ?= cpu

BIN := .venv/bin
# Each process begins with a contiguous part, so that the tests of a file share what they trace.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
OPTIMISED := JAX_DISABLE_MOST_OPTIMIZATIONS=0
ENGINE := $(addprefix tests/,core estimators algorithms testing utils)
STUDIES := from gradhpo.studies.registry import STUDIES; print(*STUDIES)

.PHONY: demo test bits faults coverage test-x64 test-optimised mutations lint types docs links audit reproduce bench \
	clean

demo: .venv/demo.stamp
	$(BIN)/gradhpo demo

# The tests, the blocks of README and docs, the doctests, the notebooks; first a few apart, `bits`.
test: .venv/dev.stamp bits
	$(PYTEST) $(TESTFLAGS)

# Tests of bits, counts and texts of programs, by the compiler that users have. The other tests
# leave most optimisations out. 5: TESTFLAGS select none.
bits: .venv/dev.stamp
	$(OPTIMISED) $(PYTEST) -m "optimised and not slow" tests $(TESTFLAGS) || test $$? = 5

# Processes that are killed, signalled and starved, see docs/reliability.md; the fuzz and all studies
# are slow tests of `make reproduce`.
faults: .venv/dev.stamp
	$(PYTEST) -m faults tests $(TESTFLAGS)

# `test` with a report of the lines run, a fifth slower before Python 3.14.
coverage: .venv/dev.stamp bits
	$(PYTEST) --cov --cov-report=term --cov-report=xml $(TESTFLAGS)

# The library's own tests with 64-bit floats as JAX's default, those that set their own default
# aside; studies and documents are 32-bit.
test-x64: .venv/dev.stamp
	JAX_ENABLE_X64=1 $(PYTEST) $(ENGINE) $(TESTFLAGS)

# The whole suite by the compiler that users have.
test-optimised: .venv/dev.stamp
	$(OPTIMISED) $(PYTEST) $(TESTFLAGS)

# Deliberate faults, each of which the tests must notice.
mutations: .venv/dev.stamp
	$(BIN)/python tests/mutations.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/pyright

# -E: of every page, as in a fresh clone; a page built before, warnings and all, would pass in silence.
docs: .venv/dev.stamp
	$(BIN)/sphinx-build -q -W -E --keep-going docs docs/_build/html

# Links of the documents to other sites; those within are a test. Needs a network.
links: .venv/dev.stamp
	$(BIN)/sphinx-build -q -W --keep-going -b linkcheck docs docs/_build/linkcheck

# Dependencies, as they are installed here, with a known vulnerability. Needs a network.
audit: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet "pip-audit>=2.7"
	$(BIN)/pip-audit --local --skip-editable

# Hours, not minutes: the slow tests, then every study at full size; replaces results in out/.
reproduce: .venv/dev.stamp
	$(OPTIMISED) $(BIN)/pytest -m slow --timeout=0 $(TESTFLAGS)
	set -e; studies=$$($(BIN)/python -c "$(STUDIES)"); \
	for study in $$studies; do $(BIN)/gradhpo run $$study --out out/$$study --overwrite; done

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/run.py

# Results in out/ stay.
clean:
	rm -rf .venv build dist docs/_build docs/api coverage.xml .coverage .coverage.*
	rm -rf .cache .hypothesis .pytest_cache .ruff_cache
	find src tests code benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Stamps: a second call installs nothing, a change of pyproject.toml installs again.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"gradhpo needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[cli,data,plot]'
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(DEV_EXTRAS)]'
	@touch $@ .venv/demo.stamp
