# `make demo` and `make test` are the whole set-up: each creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint bench docs wheel-test clean

demo: $(STAMP)
	$(BIN)/adaptd demo --json adaptd-demo/demo.json

test: $(STAMP)
	$(BIN)/pytest -m "not slow and not gpu and not vllm"

test-all: $(STAMP)
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/buffer.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

wheel-test: $(STAMP)
	bash tests/wheel.sh

# torch is installed first and by exact version: a range would pull the CUDA build on Linux.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info adaptd-demo
