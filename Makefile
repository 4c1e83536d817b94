# `make` lists the targets. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A rented GPU machine has Python and torch, no network and no .venv: benchmarks/gpu/wheels collects the rest.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,env PYTHONPATH=$(CURDIR):$(CURDIR)/.gpu-packages $(PYTHON))

.PHONY: help setup demo test test-all test-oldest test-newest test-gpu test-browser check docs bench bench-data bench-gpu bench-scaling equality faults wheel clean

help:  ## Show this list (the default)
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv and install, pinned by constraints.txt; nothing when up to date

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup  ## Pretrain a tiny model, fine-tune it with QLoRA, merge it, and ask it questions (3 minutes, no GPU)
	$(BIN)/python demo/run.py

test: setup  ## Run the tests (CPU, no downloads)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-all: setup  ## Run the tests, slow ones too
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not gpu and not browser"

test-oldest:  ## Install the lowest allowed versions in .venv-oldest, test them end to end (TORCH=2.13.0: with that torch)
	sh .ci/versions oldest

test-newest:  ## The same with the newest allowed versions, in .venv-newest
	sh .ci/versions newest

test-gpu:  ## Run the tests that need an NVIDIA GPU (5 minutes; without .venv with what benchmarks/gpu/wheels collected)
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu tests/models/attention/test_packed.py

check: setup  ## Lint, check the formatting, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## Write the pages of docs/ that are made from the code
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/generate_compatibility.py
	$(BIN)/python -m sft_lightning migrate --table > docs/migrating.md

bench: setup  ## Run the benchmarks; results go to benchmarks/results/
	$(BIN)/python benchmarks/train.py

bench-gpu:  ## Measure training steps on this machine's GPU, cell by cell (10 minutes; CELLS='lora qlora': only these)
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(CELLS),--cells $(CELLS))

bench-data: setup  ## Tokenize and pack 50k rows beside TRL and LLaMA-Factory (creates their environments; an hour)
	$(BIN)/python benchmarks/data.py

equality: setup  ## Compare gradients of all splits, and resumed runs with uninterrupted ones; writes docs/equality.md (5 minutes)
	$(BIN)/python benchmarks/equality.py

faults: setup  ## Plant 46 faults one at a time: does fit or selftest notice? (10 minutes; ARGS='--only NAME')
	$(BIN)/python -m benchmarks.faults $(ARGS)

bench-scaling: setup  ## Two processes against one, by strategy: speed, bytes sent, memory while training and loading (15 minutes)
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/loading.py

test-browser: setup  ## Run the tests that need headless Chromium
	$(BIN)/python -m pytest -m browser

wheel: setup  ## Build the wheel, install it in a clean environment, run it there
	sh .ci/wheel

clean:  ## Remove .venv, runs/ and caches
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
