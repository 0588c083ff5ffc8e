PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Every target installs into the one environment, and two pips at once would break it.
.NOTPARALLEL:

.DEFAULT_GOAL := help
.PHONY: help demo test bench-demo bench-step check format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Fine-tune a small model with and without freezing, on the CPU
	$(BIN)/python examples/demo.py

test: $(VENV)/.stamp-test $(VENV)/.stamp-assets ## Run all tests; PYTEST_ARGS="-m 'not slow'" for the fast ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench-demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Repeat the demo over three seeds, into benchmarks/results
	$(BIN)/python benchmarks/demo.py

bench-step: $(VENV)/.stamp-bench $(VENV)/.stamp-assets ## Time steps, the activation cache and its store, into benchmarks/results
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/cached_run.py
	$(BIN)/python benchmarks/cached_run.py --padding max_length
	$(BIN)/python benchmarks/cache_store.py

check: $(VENV)/.stamp-dev ## Check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an install that was cut off is done again. One stamp per set of extras.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel
	@touch $@

$(VENV)/.stamp-assets: requirements-demo-assets.txt $(VENV)/.stamp-venv
	$(INSTALL) --no-deps -r requirements-demo-assets.txt
	@touch $@

$(VENV)/.stamp-%: setup.cfg constraints.txt $(VENV)/.stamp-venv
	$(INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@
