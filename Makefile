# One command per purpose; `make help` lists them. Every target sets up what it needs in .venv, once, and again when the pins change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= hope_tiny
TRAIN_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
AOT_ARGS ?=
BENCH_ARGS ?=
COMPARE_ARGS ?=
PROMPT ?= The
CONTROLS := transformer_tiny hope_tiny_memory_off hope_tiny_static
MCORE019 := .megatron-0.19

# A machine whose own Python already drives a GPU keeps its torch; everywhere else the pinned torch goes in first, because later
# packages would pull another one. TORCH_ARGS passes pip options, for example an index of CPU-only wheels.
TORCH_ARGS ?=
ifndef SYSTEM_TORCH
SYSTEM_TORCH := $(shell nvidia-smi -L >/dev/null 2>&1 && $(PYTHON) -c 'import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null)
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

$(VENV)/constraints.txt: constraints.txt
ifeq ($(SYSTEM_TORCH),yes)
	@echo "using the torch of $(PYTHON): it sees a GPU"
	$(PYTHON) -m venv --system-site-packages $(VENV)
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $@
else
	$(PYTHON) -m venv $(VENV)
	cp constraints.txt $@
	$(PIP) $(TORCH_ARGS) torch
endif

$(VENV)/.stamp-base: $(VENV)/constraints.txt pyproject.toml
	$(PIP) -e .
	@touch $@

# fla-core (an independent oracle of the linear special cases) and mosaicml-streaming pin other versions than they need: --no-deps.
$(VENV)/.stamp-full: $(VENV)/.stamp-base requirements/streaming-cpu.txt
	$(PIP) -e '.[dev,test]'
	$(PIP) --no-deps fla-core einops
	$(PIP) --no-deps -r requirements/streaming-cpu.txt
	@touch $@

$(MCORE019)/.stamp: $(VENV)/.stamp-full
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --upgrade --target $(MCORE019) megatron-core==0.19.2
	@touch $@

data/tiny/manifest.json: | $(VENV)/.stamp-base
	$(BIN)/hope-data tiny --out data/tiny

.PHONY: env
env: $(VENV)/.stamp-full ## the environment with everything that lint, types and tests need

.PHONY: data
data: data/tiny/manifest.json ## the tiny corpus: tokenizer and shards from the embedded public-domain text

.PHONY: train
train: $(VENV)/.stamp-base data ## pretrain configs/hope_tiny.toml on real text, report it, sample from it (no GPU needed)
	$(BIN)/hope train configs/hope_tiny.toml name=$(RUN) $(TRAIN_ARGS)
	$(BIN)/hope report runs/$(RUN) $(addprefix docs/results/,$(addsuffix .json,$(CONTROLS)))
	$(BIN)/hope generate runs/$(RUN) --prompt "$(PROMPT)" --tokens 120

.PHONY: controls
controls: $(VENV)/.stamp-base data ## the transformer twin, memory off and static projections, on the same tokens at the same size; their curves
	set -e; for name in $(CONTROLS); do \
	  $(BIN)/hope train configs/$$name.toml $(TRAIN_ARGS); $(BIN)/hope report runs/$$name --store-curve docs/results/$$name.json; done

.PHONY: mqar
mqar: $(VENV)/.stamp-base ## associative recall: HOPE, its memory-off control at chance, and a transformer
	$(BIN)/hope train configs/mqar_hope.toml $(TRAIN_ARGS)
	$(BIN)/hope train configs/mqar_memory_off.toml $(TRAIN_ARGS)
	$(BIN)/hope train configs/mqar_transformer.toml $(TRAIN_ARGS)

.PHONY: test
test: $(VENV)/.stamp-full ## the whole test suite, on TEST_WORKERS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

.PHONY: test-mcore019
test-mcore019: $(MCORE019)/.stamp ## the engine's tests against megatron-core 0.19.2
	PYTHONPATH=$(CURDIR)/$(MCORE019) $(BIN)/python -m pytest -k "engine or distributed" $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.stamp-full ## ruff, import directions, file and function sizes
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python tools/size_gate.py

.PHONY: types
types: $(VENV)/.stamp-full ## mypy
	$(BIN)/mypy

.PHONY: bench
bench: $(VENV)/.stamp-base ## CPU speed and memory of a HOPE block beside a transformer block of equal size
	$(BIN)/python -m tools.bench.cpu

.PHONY: aot
aot: $(VENV)/.stamp-full ## compile every Triton kernel for Hopper and Blackwell without a GPU; spills, missing products or a changed baseline fail
	env -u TRITON_INTERPRET $(BIN)/python -m tools.aot $(AOT_ARGS)

.PHONY: bench-gpu
bench-gpu: $(VENV)/.stamp-full ## on a GPU: check and time the kernels, then training steps, then loss parity (docs/kernels.md)
	$(BIN)/python -m tools.bench.gpu $(BENCH_ARGS)
	$(BIN)/python -m tools.bench.step
	$(BIN)/python -m tools.bench.step --parity

.PHONY: stability
stability: $(VENV)/.stamp-base data ## both chunk presets, three seeds, peak learning rate, long sequence; and the literal objective beside them
	$(BIN)/python -m tools.stability

.PHONY: optimizers
optimizers: $(VENV)/.stamp-full data ## the outer optimizers compared: small configuration, digits, the paper's toy problem, step time at 170M
	$(BIN)/python -m tools.optimizers.compare $(COMPARE_ARGS)
	$(BIN)/python -m tools.optimizers.digits
	$(BIN)/python -m tools.optimizers.toy
	$(BIN)/python -m tools.optimizers.step_time

.PHONY: coordinate-check
coordinate-check: $(VENV)/.stamp-full data ## does a step change as much at every width, and does the best learning rate stay?
	$(BIN)/python -m tools.optimizers.coordinate_check

.PHONY: kill-trials
kill-trials: $(VENV)/.stamp-base data ## kill -9 the trainer at random moments; the resumed losses must be bit-identical
	$(BIN)/python -m tools.kill_trials

.PHONY: failure-trials
failure-trials: $(VENV)/.stamp-base ## kill, stop or break one rank of real jobs in every phase; all must end within 30 s and name it
	$(BIN)/python -W ignore -m tools.failure_trials --out tools/bench/results/failure_trials.json

.PHONY: hang-trials
hang-trials: $(VENV)/.stamp-base ## let one rank of real jobs hang in every phase; all must end soon after the limit, with stacks and a culprit
	$(BIN)/python -W ignore -m tools.hang_trials --out tools/bench/results/hang_trials.json

.PHONY: checkpoint-faults
checkpoint-faults: $(VENV)/.stamp-base ## 200 faults against checkpoints of two ranks, and against plain torch.distributed.checkpoint
	$(BIN)/python -W ignore -m tools.checkpoint_faults --out tools/bench/results/checkpoint_faults.json

# The cluster's tests need Slurm's Debian packages and root; without them they are skipped and say so. submitit is pure Python.
$(VENV)/.stamp-slurm: $(VENV)/.stamp-full
	$(PIP) -e '.[slurm]'
	@touch $@

.PHONY: test-slurm
test-slurm: $(VENV)/.stamp-slurm ## every scenario on a real Slurm of virtual nodes on this machine (root, slurm-wlm); docs/slurm.md
	HOPE_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm $(PYTEST_ARGS)

.PHONY: test-slurm-short
test-slurm-short: $(VENV)/.stamp-slurm ## the short lane of the same, a few minutes
	HOPE_TEST_SLURM=1 $(BIN)/python -m pytest -m "not slow" $(addprefix tests/slurm/test_,protocol.py training.py kills.py launch_cluster.py) $(PYTEST_ARGS)

.PHONY: slurm-trials
slurm-trials: $(VENV)/.stamp-slurm ## 100 kills, 20 full disks, 4 -> 2 -> 8 ranks, stops and hangs of the real trainer there; an idle machine, some 90 minutes; docs/results/slurm
	set -e; for trial in "recovery kills 15 --layouts dp2,tp2dp2" "kills kills 100 --parallel 3" "disk-full disk-full 20" "disk-full-whole disk-full 6 --whole" \
	  "worlds worlds" "stops stops" "hangs hangs 20"; do $(BIN)/python -W ignore -m tools.slurm_trials --name $$trial; done

.PHONY: slurm-up
slurm-up: ## start the Slurm of virtual nodes; prints the variable that its commands need
	tools/onebox_slurm/start.sh

.PHONY: slurm-down
slurm-down: ## end it, and its jobs
	tools/onebox_slurm/stop.sh

.PHONY: golden
golden: $(VENV)/.stamp-base ## rewrite tests/golden/configs after a deliberate change of a configuration
	$(BIN)/python tools/golden_configs.py

.PHONY: layouts
layouts: $(VENV)/.stamp-base ## rewrite the numbers in the tables of docs/layouts.md and docs/scaling.md from the planner
	$(BIN)/python -m tools.layout_tables

.PHONY: clean
clean: ## remove caches and the environment; runs/ and data/ stay
	rm -rf $(VENV) $(MCORE019) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  %-18s %s\n' "$$name" "$$text"; done
