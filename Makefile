# Everything a person types. Each target makes what it needs; a second call is instant.
.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-clients page-test sanitize fuzz ray-test image-check ops-test lint format bench soak clean

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

page-test: $(VENV)/.installed-test  ## the live page in headless Chromium, which has to be installed; SCREENSHOTS=FOLDER takes pictures
	$(BIN)/pip install --quiet --editable '.[browser]'
	$(BIN)/python -m pytest -m slow tests/page $(ARGS)

sanitize: $(VENV)/.installed-test  ## the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer (minutes)
	$(BIN)/python tests/sanitizers/sanitize.py address $(ARGS)
	$(BIN)/python tests/sanitizers/sanitize.py thread $(ARGS)

fuzz: $(VENV)/.installed-test  ## more than fifty thousand bad inputs, counted (minutes); ARGS="bodies --scale 0.1"
	$(BIN)/python tests/security/fuzz.py $(ARGS)

ray-test: $(VENV)/.installed-test  ## two replicas on Ray Serve, one of them killed under load; installs Ray (minutes)
	$(BIN)/pip install --quiet --editable '.[ray]'
	$(BIN)/python -m pytest tests/deploy tests/unit/deploy $(ARGS)

image-check: $(VENV)/.installed-test  ## the Dockerfile's steps run and its image served, without Docker; as root, wants debootstrap
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/image/check.py $(ARGS)

# Debian's Prometheus where none is installed, unpacked and not installed; Grafana's components, for the board's picture.
MONITORING := build/monitoring
PROMETHEUS := $(if $(shell command -v promtool),,$(MONITORING)/usr/bin/promtool)

$(MONITORING)/usr/bin/promtool:
	mkdir -p $(MONITORING)
	cd $(MONITORING) && apt-get download prometheus && dpkg -x prometheus_*.deb .

$(MONITORING)/board.js: tests/monitoring/drawing/package.json tests/monitoring/drawing/board.jsx
	mkdir -p $(MONITORING)
	cp $^ $(MONITORING)
	cd $(MONITORING) && npm install --no-audit --no-fund --ignore-scripts --loglevel=error && npm run --silent build

ops-test: $(VENV)/.installed-test $(PROMETHEUS) $(MONITORING)/board.js  ## alerts and board beside a real Prometheus and a server under load; wants npm and Chromium
	$(BIN)/pip install --quiet --editable '.[browser]'
	PATH="$$PATH:$(CURDIR)/$(MONITORING)/usr/bin" $(BIN)/python -m pytest tests/monitoring $(ARGS)
	@echo "The board as it was drawn: $(MONITORING)/board.png"

lint: $(VENV)/.installed-lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict scheduler server engine/messages.py

format: $(VENV)/.installed-lint  ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## load the server that runs on 127.0.0.1:8000; ARGS="--request-rate 4 …"
	$(BIN)/quire bench serve --concurrency 8 $(ARGS)

soak: $(VENV)/.installed-test  ## lean on servers of its own for an hour and judge; ARGS="--quick" for minutes, ARGS="aborts faults" for some
	$(BIN)/python -m quire.bench.soak $(ARGS)

clean:  ## remove everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis kernels/cpu/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
