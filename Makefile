# `make demo` and `make test` are the whole set-up: each creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A vLLM server for the tests against the real thing, apart from .venv: it pins other versions of torch and transformers.
ADAPTD_VLLM ?= .vllm
VLLM_STAMP := .vllm/.installed
VLLM_TESTS ?= tests/integration/vllm

.PHONY: demo test test-all test-vllm lint bench docs wheel-test clean

demo: $(STAMP)
	$(BIN)/adaptd demo --json adaptd-demo/demo.json

# What starts daemons and waits for them has the machine for itself; the rest shares it out, one thread each.
APART := tests/integration tests/browser
QUICK := not slow and not gpu and not vllm

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "$(QUICK)" -n auto --maxprocesses 8 --dist loadfile tests $(APART:%=--ignore=%)
	$(BIN)/pytest -m "$(QUICK)" $(APART)

test-all: $(STAMP)
	$(BIN)/pytest -m "not vllm"

test-vllm: $(STAMP) $(if $(filter .vllm,$(ADAPTD_VLLM)),$(VLLM_STAMP))
	ADAPTD_VLLM=$(ADAPTD_VLLM) $(BIN)/pytest -m vllm $(VLLM_TESTS)

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

$(VLLM_STAMP): tests/vllm/setup.sh
	PYTHON=$(PYTHON) bash tests/vllm/setup.sh .vllm
	touch $(VLLM_STAMP)

clean:
	rm -rf $(VENV) .vllm build dist *.egg-info adaptd-demo
