# VENV=DIR reuses an environment; TORCH_INDEX_URL=URL takes torch from there (a CPU build for a laptop, another CUDA for a card);
# HASHES=1 refuses a package of requirements-hashes.txt (all but torch and what its CUDA builds bring) whose file is another.
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX_URL ?=
HASHES ?=
# Column that `make leaderboard` sorts by, lowest first: a metric of evaluate.headline (eval_loss is not there without a validation), or a param.
SORT ?= eval_loss
# Processes of `make test`, for two cores: some tests wait. Each has one thread where a test asks for no more, and none spins while it waits.
JOBS ?= 3
# Arguments for pytest: a file, a folder, -k WORDS.
TESTS ?=

# Stages are run as `python -m ...` by dvc: the environment comes first on PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH)
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

.PHONY: help setup repro leaderboard test check bench torture

help: ## List these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 16

setup: $(READY) ## Make the environment that the pipeline runs in

repro: $(READY) ## Run the pipeline: only stages whose inputs changed
	@python -m tools.check
	dvc repro

leaderboard: $(READY) ## Compare HEAD and its experiments: every score, and the params that differ (SORT=nll sorts by it)
	@dvc exp show --only-changed --hide-workspace --sort-by $(SORT) --drop '(Created|requirements.txt)$$|.*/' --keep '(?!(rev|typ|parent)$$)[a-z0-9_]+$$'

test: $(READY_DEV) ## Run all tests (TESTS=tests/unit: some)
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

check: $(READY_DEV) ## Format, lint and types
	ruff format --check .
	ruff check .
	mypy

bench: repro ## Measure side by side for about half an hour (a GPU: up to 80 minutes more), write docs/performance.md
	python -m benchmarks

torture: $(READY_DEV) ## Kill runs at random moments for an hour and compare every byte (KILLS=200 MINUTES=60 SEED=0)
	python -m benchmarks.torture --kills $(or $(KILLS),200) --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0)

$(READY): requirements.txt tools/qlora.sh
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX_URL),python -m pip install --quiet --index-url $(TORCH_INDEX_URL) "$$(grep -o '^torch==[^ ]*' requirements.txt)")
	$(if $(HASHES),python -m pip install --quiet --no-deps --require-hashes -r requirements-hashes.txt)
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	install -m 755 tools/qlora.sh $(VENV)/bin/qlora
	touch $@

$(READY_DEV): requirements-dev.txt requirements-benchmark.txt requirements-ray.txt requirements-s3.txt requirements-serve.txt $(READY)
	python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
