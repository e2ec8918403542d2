# Every target works in a fresh clone: the first one creates .venv. README.md has the commands without make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test conformance soak hostile mutants lint type fmt bench bench-peers generated vendored docs

help:
	@echo "make demo | test | conformance | soak | hostile | mutants | lint | type | fmt | bench | bench-peers | generated | vendored | docs"

# Targets run the installed package, so they install the working tree first. A build/ of an earlier install would
# add deleted modules.
install: | $(BIN)/pip
	rm -rf build
	$(BIN)/pip install --quiet '.[test]'

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# Installs the linters once, and again when setup.py changes.
$(BIN)/.tools: setup.py
	$(MAKE) install
	touch $@

demo: install
	$(BIN)/loadledger demo

test: install
	$(BIN)/pytest

# All of ONNX's conformance cases over HTTP and gRPC; `make test` runs a sample.
conformance: install
	CONFORMANCE=all $(BIN)/pytest -n 0 -s tests/conformance

# The long forms of tests that `make test` runs for seconds: half an hour, with figures. Also the ledger's
# properties with many new examples.
soak: install
	SOAK=all $(BIN)/pytest -n 0 -s $(foreach soak,$(SOAKS),tests/$(soak).py)
	SOAK=all $(BIN)/pytest tests/events

SOAKS := runtime/scheduler/test_simulation nodes/test_cluster_simulation runtime/store/test_store \
	runtime/consumer/test_provenance runtime/rows/test_random_graphs \
	$(addprefix system/test_,bench many_models cycles killed_servers cluster tails)

# Attacks on a server with a good model, in their long forms: some minutes each, with figures.
hostile: install
	$(BIN)/pip install --quiet '.[test,hostile]'
	rm -rf build
	SOAK=all $(BIN)/pytest -n 0 -s tests/hostile

# Changes the product at random places, one at a time, and prints which changes no test notices: an hour or more.
# Another SEED draws other places. CALLS names a folder for the first run's records, to use them again.
SEED ?= 1
mutants: install
	$(BIN)/python -m tools.mutants --seed $(SEED) $(if $(CALLS),--calls $(CALLS))

lint: $(BIN)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(BIN)/.tools
	$(BIN)/mypy answers bench events examples features loadledger migrations nodes runtime server tests tools

fmt: $(BIN)/.tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m bench

# Measures Triton, too, from NVIDIA's wheel in an environment of its own. Its Python backend needs numpy 1 (with
# numpy 2 its outputs are empty), which supports Python up to 3.12. Only the server in the wheel runs, so its
# dependencies are not installed. ONNX Runtime has our version.
PEERS := .venv/peers
PEERS_PYTHON ?= $(PYTHON)

bench-peers: install $(PEERS)/.installed
	$(BIN)/python -m bench --only inference --only compute --peers $(PEERS)

$(PEERS)/.installed: | $(BIN)/pip
	$(PEERS_PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13) and "Triton needs numpy 1: set PEERS_PYTHON to a Python 3.11 or 3.12")'
	$(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet 'numpy<2' \
	    "onnxruntime==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("onnxruntime"))')"
	$(PEERS)/bin/pip install --quiet --no-deps nvidia-pytriton==0.7.0
	touch $@

# Generates the reference pages and openapi.yaml from the code. `python -m` imports the packages of the working
# tree.
generated: $(BIN)/.tools
	$(BIN)/python -m tools.generate

# Fetches the console's libraries from the npm registry, at the versions in tools/vendored.py.
vendored: $(BIN)/.tools
	$(BIN)/python -m tools.vendored

# Builds the site of the documentation to site/. A warning is an error: also a link or an anchor that leads nowhere.
docs: | $(BIN)/pip
	$(BIN)/pip install --quiet '.[docs]'
	rm -rf build site
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees -c docs . site
	rm -rf build
