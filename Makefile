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
.PHONY: help demo test test-distributed fuzz bench-demo bench-step bench-regret bench-held-out predictor predictor-smoke check format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Fine-tune a small model with and without freezing, on the CPU
	$(BIN)/python examples/demo.py

test: $(VENV)/.stamp-test $(VENV)/.stamp-assets ## Run all tests; PYTEST_ARGS="-m 'not slow'" for the fast ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-distributed: $(VENV)/.stamp-test $(VENV)/.stamp-assets ## Run the tests with two processes, which `make test` runs too
	$(BIN)/python -m pytest tests/distributed $(PYTEST_ARGS)

fuzz: $(VENV)/.stamp-test ## Compare 2,000 short trainings with and without the activation cache
	$(BIN)/python tests/fuzz/fuzz.py 0 2000

bench-demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Repeat the demo over three seeds, into benchmarks/results
	$(BIN)/python benchmarks/demo.py

bench-step: $(VENV)/.stamp-bench $(VENV)/.stamp-assets ## Time steps, the activation cache and its store, into benchmarks/results
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/cached_run.py
	$(BIN)/python benchmarks/cached_run.py --padding max_length
	$(BIN)/python benchmarks/cache_store.py

bench-regret: $(VENV)/.stamp-harvest $(VENV)/.stamp-assets ## What labels say of the cost of a freeze, into benchmarks/results; DATA_DIR=... for local data
	$(BIN)/python benchmarks/regret.py $(if $(DATA_DIR),--data_dir $(DATA_DIR))

bench-held-out: $(VENV)/.stamp-harvest $(VENV)/.stamp-assets ## Fine-tunings that no choice has seen, into benchmarks/results; data from packages and the Hub
	$(BIN)/python benchmarks/package_data.py runs/held_out_data glue/stsb mnist sentiment
	$(BIN)/python benchmarks/held_out.py --data_dir runs/held_out_data
	$(BIN)/python benchmarks/headroom.py --data_dir runs/held_out_data

predictor: $(VENV)/.stamp-harvest $(VENV)/.stamp-assets ## Make the shipped predictor from raw runs (hours); DATA_DIR=... for local data
	$(BIN)/smartfrz harvest benchmarks/harvest/base.json --out runs/base --processes 2 $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	$(BIN)/smartfrz evaluate runs/base --out benchmarks/results/predictor.json
	$(BIN)/smartfrz fit runs/base --evaluation benchmarks/results/predictor.json --out predictor_weights/smartfrz-base

predictor-smoke: $(VENV)/.stamp-harvest $(VENV)/.stamp-assets ## The same road in minutes, on tiny models and data from packages
	$(BIN)/python benchmarks/package_data.py runs/smoke/data digits glue/stsb
	$(BIN)/smartfrz harvest benchmarks/harvest/smoke.json --out runs/smoke/harvest --processes 2 --data-dir runs/smoke/data
	$(BIN)/smartfrz evaluate runs/smoke/harvest --out runs/smoke/evaluation.json
	$(BIN)/smartfrz fit runs/smoke/harvest --evaluation runs/smoke/evaluation.json --out runs/smoke/predictor

# The full harvest fetches its data from the Hub unless it is told where copies are.
predictor bench-regret bench-held-out: export HF_HUB_OFFLINE := $(if $(DATA_DIR),1,0)

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
