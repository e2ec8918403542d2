# Every target works from a fresh clone: the first makes .venv. Without make, README.md has the commands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test lint type fmt bench openapi

help:
	@echo "make demo | test | lint | type | fmt | bench | openapi"

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

lint: $(BIN)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(BIN)/.tools
	$(BIN)/mypy bench events examples migrations runtime server tests

fmt: $(BIN)/.tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m bench

# `python -m` finds the tree's own `server` first; the installed one is for its dependencies.
openapi: $(BIN)/.tools
	$(BIN)/python -m server.openapi > openapi.yaml.new
	mv openapi.yaml.new openapi.yaml
