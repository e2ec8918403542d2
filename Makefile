# Every target works from a fresh clone: the first makes .venv. Without make, README.md has the commands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test conformance soak lint type fmt bench bench-peers generated

help:
	@echo "make demo | test | conformance | soak | lint | type | fmt | bench | bench-peers | generated"

# What runs is the installed package, so every target that runs it installs the present tree first. A build/
# left by an earlier install would put deleted modules into this one.
install: | $(BIN)/pip
	rm -rf build
	$(BIN)/pip install --quiet '.[test]'

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# The linters are installed once, and again when setup.py asks for others.
$(BIN)/.tools: setup.py
	$(MAKE) install
	touch $@

demo: install
	$(BIN)/loadledger demo

test: install
	$(BIN)/pytest

# All of ONNX's own conformance cases over HTTP; `make test` takes every 80th.
conformance: install
	CONFORMANCE=all $(BIN)/pytest -n 0 -s tests/conformance

# The long forms of what `make test` does for some seconds each: about half an hour, with figures; and the
# properties of the ledger, with many new examples.
soak: install
	SOAK=all $(BIN)/pytest -n 0 -s $(foreach soak,$(SOAKS),tests/$(soak).py)
	SOAK=all $(BIN)/pytest tests/events

SOAKS := runtime/scheduling/test_simulation runtime/prepared/test_prepared_store \
	$(addprefix system/test_,bench many_models cycles killed_servers restore tails prepared)

lint: $(BIN)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(BIN)/.tools
	$(BIN)/mypy bench events examples loadledger migrations runtime server tests tools

fmt: $(BIN)/.tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m bench

# Triton, from a wheel of NVIDIA's, in an environment of its own: its Python backend needs numpy 1 (with numpy 2
# its outputs are empty), whose last wheels are for Python 3.12. Of the wheel only the server in it is run, so
# what else the wheel asks for is left out. ONNX Runtime is in our version.
PEERS := .venv/peers
PEERS_PYTHON ?= $(PYTHON)

bench-peers: install $(PEERS)/.installed
	$(BIN)/python -m bench --only inference --peers $(PEERS)

$(PEERS)/.installed: | $(BIN)/pip
	$(PEERS_PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13) and "Triton needs numpy 1: set PEERS_PYTHON to a Python 3.11 or 3.12")'
	$(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet 'numpy<2' \
	    "onnxruntime==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("onnxruntime"))')"
	$(PEERS)/bin/pip install --quiet --no-deps nvidia-pytriton==0.7.0
	touch $@

# What is generated from the code, and tests hold to it. `python -m` finds the tree's own packages first; the
# installed one is for its dependencies.
generated: $(BIN)/.tools
	$(BIN)/python -m tools.generate
