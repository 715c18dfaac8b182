# Everything a person types. Each target makes what it needs; a second call is instant.
.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-clients sanitize fuzz image-check lint format bench soak clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: pip runs again only when the dependencies or the compiled kernels may have changed.
INSTALLED_FROM := pyproject.toml $(wildcard kernels/cpu/native/src/*)

$(VENV)/.installed: $(BIN)/python $(INSTALLED_FROM)
	@echo "Installing; the first time takes minutes (torch is large)."
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python $(INSTALLED_FROM)
	@echo "Installing; the first time takes minutes (torch is large)."
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: $(BIN)/python $(INSTALLED_FROM)
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@

serve: $(VENV)/.installed  ## serve the bundled model on 127.0.0.1:8000; ARGS="MODEL --option …" for another
	$(BIN)/quire serve --host 127.0.0.1 --port 8000 $(ARGS)

test: $(VENV)/.installed-test  ## the default tests (minutes on two cores, no GPU); ARGS="-k name" for some of them
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.installed-test  ## the heavy suites as well
	$(BIN)/python -m pytest $(ARGS)

test-clients: $(VENV)/.installed-test  ## clients of other makers against a real server; installs them (large)
	$(BIN)/pip install --quiet --editable '.[clients]'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/api/clients $(ARGS)

sanitize: $(VENV)/.installed-test  ## the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer (minutes)
	$(BIN)/python tests/sanitizers/sanitize.py address $(ARGS)
	$(BIN)/python tests/sanitizers/sanitize.py thread $(ARGS)

fuzz: $(VENV)/.installed-test  ## more than fifty thousand bad inputs, counted (half an hour); ARGS="bodies --scale 0.1"
	$(BIN)/python tests/security/fuzz.py $(ARGS)

image-check: $(VENV)/.installed-test  ## the Dockerfile's steps run and its image served, without Docker; as root, wants debootstrap
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/image/check.py $(ARGS)

lint: $(VENV)/.installed-lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict scheduler server engine/messages.py

format: $(VENV)/.installed-lint  ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## load the server that runs on 127.0.0.1:8000; ARGS="--request-rate 4 …"
	$(BIN)/quire bench serve --concurrency 8 $(ARGS)

soak: $(VENV)/.installed-test  ## lean on servers of its own for hours and judge; ARGS="--quick" for minutes, ARGS="aborts faults" for some
	$(BIN)/python -m quire.bench.soak $(ARGS)

clean:  ## remove everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis kernels/cpu/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
