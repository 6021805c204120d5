# Everything here needs Python >= 3.10, make and a package registry, and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv adapterhub-venv format format-check lint types unit test test-all faults soak fuzz fuzz-guided audit demo demo-data topics-data bench-topics bench-speed bench-busy bench-products bench-rows bench-merge conformance wheel clean

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
ADAPTERHUB := .venv-adapters
AUDIT := .venv-audit
# one thread a worker: two workers of two threads on two cores only wait for each other
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
WORKERS ?= 2
# slow tests that compute on a real model, and so take every core by themselves
REAL := tests/test_real.py tests/objectives/test_miniature.py

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Build .venv with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,metrics]'
	@touch $@

adapterhub-venv: $(ADAPTERHUB)/.installed ## Build .venv-adapters: adapter-hub's package, which asks for an older transformers

$(ADAPTERHUB)/.installed:
	test -x $(ADAPTERHUB)/bin/python || $(PYTHON) -m venv $(ADAPTERHUB)
	$(ADAPTERHUB)/bin/python -m pip install --quiet torch==2.13.0 adapters==1.3.0
	@touch $@

format: venv ## Rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: venv ## Check the format
	$(BIN)/ruff format --check .

lint: venv ## Check the code with ruff
	$(BIN)/ruff check .

types: venv ## Check the types with mypy, strictly
	$(BIN)/mypy

unit: venv ## Run the tests alone
	$(SINGLE) $(OFFLINE) $(BIN)/pytest -n $(WORKERS)

test: format-check lint types unit ## What CI runs: format, lint, types, tests

test-all: test demo adapterhub-venv ## Also the slow tests on real models, the README's commands and the demo
	$(SINGLE) $(OFFLINE) $(BIN)/pytest -n $(WORKERS) -m slow $(REAL:%=--ignore %)
	$(OFFLINE) $(BIN)/pytest -n 0 -m slow $(REAL)

faults: venv ## Cause every fault there is a test for, and print what was seen
	$(SINGLE) $(OFFLINE) $(BIN)/python -m tests.faults -n $(WORKERS)

soak: venv ## Kill runs at random and compare what comes of them; ARGS="--trials 50" adds as many to the log
	$(SINGLE) $(OFFLINE) $(BIN)/python -m tests.faults.soak $(ARGS)

fuzz: venv ## Feed the readers of files what strangers may write; ARGS="--minutes 5"
	$(SINGLE) $(OFFLINE) $(BIN)/python -m tests.faults.fuzz $(ARGS)

fuzz-guided: venv ## The same for one reader, led by the code it reaches; needs pip install atheris; ARGS="rows 300"
	$(SINGLE) $(OFFLINE) $(BIN)/python -m tests.faults.guided $(ARGS)

audit: venv $(AUDIT)/bin/pip-audit ## Ask for holes that are known in the installed packages
	$(BIN)/python tests/faults/audit.py $(AUDIT)/bin/pip-audit

$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.7'

demo-data: venv ## Fetch the demo's base model and dialogues into .cache
	$(BIN)/python tests/demo/fetch.py

demo: demo-data ## The whole job on a real model: count, train, evaluate, merge, generate
	PATH="$(CURDIR)/$(BIN):$$PATH" $(OFFLINE) tests/demo/demo.sh

topics-data: venv ## Fetch a real encoder and turns with their topics into .cache
	$(BIN)/python -m tests.demo.topics

bench-topics: topics-data ## Compare methods at telling topics: accuracy and parameters; ARGS="--choose", see tests/benchmarks/topics.py
	$(SINGLE) $(OFFLINE) $(BIN)/python -m tests.benchmarks.topics $(ARGS)

bench-speed: demo-data ## Measure the speed against TRL + peft; ARGS="--list" and others, see tests/benchmarks/speed.py
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)

bench-products: venv ## Measure one linear's products in every type and way; ARGS="--rounds 9", see tests/benchmarks/products.py
	$(BIN)/python -m tests.benchmarks.products $(ARGS)

bench-busy: demo-data ## Measure a run beside another process on the same processors; ARGS="--beside run" and others, see tests/benchmarks/busy.py
	$(OFFLINE) $(BIN)/python -m tests.benchmarks.busy $(ARGS)

bench-rows: venv ## Measure the pre-flight of 100,000 rows: seconds and memory; ARGS="--streaming" and others, see tests/benchmarks/rows.py
	$(OFFLINE) $(BIN)/python -m tests.benchmarks.rows $(ARGS)

conformance: venv ## Print published parameter counts beside ours
	@$(BIN)/python -m tests.conformance

bench-merge: venv ## Measure merging at a real size: seconds and memory, against peft and cp; ARGS="--shape 7b" and others, see tests/benchmarks/merge.py
	$(OFFLINE) $(BIN)/python -m tests.benchmarks.merge $(ARGS)

wheel: venv ## Build the wheel into dist
	$(BIN)/python -m build --wheel

clean: ## Remove what the other targets made, but the downloads and the runs
	rm -rf $(VENV) $(ADAPTERHUB) $(AUDIT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
