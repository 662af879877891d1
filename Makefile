# make demo and make test are each enough on a fresh machine with Python 3.11 or later; neither needs root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS ?= $(basename $(notdir $(filter-out benchmarks/_% benchmarks/table%.py,$(wildcard benchmarks/*.py))))
BENCH_FLAGS ?=
PYTEST_FLAGS ?=
CLUSTER ?= cluster
# processes that make test runs the tests in, each with a Ray of its own
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo molecules shapes table1 test test-slow test-cluster wheel lint types layers check bench clean

help:
	@echo 'make demo       install, then raise the QED of a molecule model and write a report under runs/'
	@echo 'make shapes     from a folder of meshes to a model of them, fine-tuned towards helicopters, with pictures'
	@echo 'make molecules  every row of Table 2 on molecules: hours, resumed where it was stopped, finished rows kept'
	@echo 'make table1     every row of Table 1 on real shapes, likewise: DATA=shapes2048.npz'
	@echo 'make test       install, then run the tests (test-slow: the long ones)'
	@echo 'make test-cluster  ray up on three hosts made of namespaces (root; apt-get install openssh-server iproute2 rsync)'
	@echo 'make wheel      this version as dist/*.whl, which cluster.yaml installs on every node'
	@echo 'make check      lint, types and import layers, each a target of its own'
	@echo 'make bench      every benchmark; BENCH_FLAGS=--quick for a short one, BENCHMARKS=name for one'

install: $(STAMP)

# The stamp comes last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rayft needs Python 3.11 or later; this is " \
	+ sys.version.split()[0] + ": name another one with make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/rayft run molecules_demo

molecules: install
	$(BIN)/python -m benchmarks.table2

shapes: install
	$(BIN)/python -m envs.shapes.generated runs/shapes_meshes
	$(BIN)/rayft pretrain shapes_pretrain domain.data=runs/shapes_meshes pretrain.steps=1000 name=shapes_model
	$(BIN)/rayft run shapes_helicopter_rgdm name=shapes_demo domain.data=runs/shapes_meshes \
		domain.weights=runs/shapes_model/weights.safetensors iterations=4 evaluate.every=0 training.lr=4e-4

table1: install
	$(BIN)/python -m benchmarks.table1 $(if $(DATA),--data $(DATA))

test: install
	$(BIN)/python -m pytest -m "not slow and not cluster" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(PYTEST_FLAGS)

test-slow: install
	$(BIN)/python -m pytest -m "slow and not cluster" --durations=10 --timeout=1800 $(PYTEST_FLAGS)

test-cluster: install
	$(BIN)/python -m pytest -m "$(CLUSTER)" -rs -s --durations=3 --timeout=900 $(PYTEST_FLAGS)

wheel: install
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	rm -rf build

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/basedpyright

layers: install
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

check: lint types layers

bench: install
	@set -e; for name in $(BENCHMARKS); do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(BENCH_FLAGS); \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info
