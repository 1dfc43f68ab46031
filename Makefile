# Everything here works on a machine that has only Python (3.10 or newer), make and git:
# the virtual environment is made on first use and found ready the second time.

PYTHON ?= python3
VENV ?= .venv
# A package index that also holds PyTorch wheels, for example a CPU-only one on Linux. Not set: the plain wheel.
TORCH_INDEX_URL ?=
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
QUIET_ENV := TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
TEST_ENV := $(QUIET_ENV) HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

# Only what is installed in the environment counts.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-weekly model lint format env clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    fine-tune SmolLM2-135M with GraphLoRA on the embedded quiz and show what was learned"
	@echo "make test    lint, types, import rules and the tests, offline on CPU"
	@echo "make test-slow  the tests that take half a minute or more each"
	@echo "make test-weekly  further ones, of full disks, lost memory and several processes"
	@echo "make model   fetch SmolLM2-135M-Instruct only (93 MB; demo does it by itself)"
	@echo "make lint    ruff, import-linter and pyright only"
	@echo "make format  rewrite the files as ruff wants them"
	@echo "make env     only the environment for development: $(VENV)"
	@echo "make clean   remove the environment and caches; models, runs and demo output stay"
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX_URL=$(TORCH_INDEX_URL)  WORKERS=$(WORKERS)"
	@echo "           PYTEST_ARGS='-k router'  DEMO_ARGS='--help'"

# --- the environment: torch first, with the tested versions, then the package -------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "graphlora needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)." \
	       "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed, see above. On Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "Installing PyTorch into $(VENV) (the first time only; without TORCH_INDEX_URL the Linux wheel may be large)"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing graphlora and what it needs into $(VENV)"
	@$(PIP_INSTALL) -e '.[gguf,plots]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing graphlora, its test and its lint tools into $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.demo $@

env: $(VENV)/.dev

# --- the two commands --------------------------------------------------------------------------------------

demo: model
	@$(QUIET_ENV) $(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: lint
	@test -d $(MODEL) || echo "$(MODEL) is absent: tests marked real_model are skipped ('make model' fetches it)"
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow and not weekly' $(PYTEST_ARGS)

test-slow: $(VENV)/.dev
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m slow $(PYTEST_ARGS)

test-weekly: $(VENV)/.dev
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m weekly $(PYTEST_ARGS)

# --- their parts -------------------------------------------------------------------------------------------

model: $(VENV)/.demo
	@$(QUIET_ENV) $(BIN)/python scripts/fetch_model.py

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
