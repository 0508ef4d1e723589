# make demo   set up, then digits -> shards -> sweep -> train -> evaluate -> register -> predict, offline
# make test   set up, then the test suite
# make soak   the long tests as well
# make lint   ruff and mypy

PYTHON ?= python3
OUT ?= out
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test soak lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run.stamp
	$(BIN)/gsa run demo --out "$(OUT)"

test: $(VENV)/.dev.stamp
	$(BIN)/python -m pytest

soak: $(VENV)/.dev.stamp
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out

$(VENV)/.run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.run.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1 || true);" \
	       "next: apt-get install python3.11-venv, or make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "make: $(PYTHON) has no venv; next: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
