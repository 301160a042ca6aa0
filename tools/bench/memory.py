"""Planned against measured bytes: one training process of the 170M configurations on the CPU (`python -m tools.bench.memory`).

Each case is a fresh process: the resident memory that the engine, its optimizer and one whole step add at their peak, in the second step,
when all optimizer state exists. glibc gives every block above 64 KiB back to the system, so resident memory follows the tensors. Beside it
the planner's figure for the same case: of the scans in plain torch, as a CPU runs them, and of a GPU's blocks of the vocabulary, which are
larger than a CPU's. Writes tools/bench/results/memory.json; --case NAME measures one in this process and prints it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from hope_pt.config import load
from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.memory import rank_bytes
from tools.bench.common import ROOT, environment, peak_mib, write_results

GOAL = 0.10
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-long": {"data.seq_len": 1024},
    "fp32-block": {"data.seq_len": 1024, "engine.recompute": "block"},
    "fp32-replayed": {"data.seq_len": 1024, "model.titans.save_every": 256},
    "fp32-documents": {"documents": 3},
    "fp32-two-rows": {"engine.micro_batch_size": 2},
    "bf16": {"engine.precision": "bf16"},
    "bf16-long": {"data.seq_len": 1024, "engine.precision": "bf16"},
    "bf16-block": {"data.seq_len": 1024, "engine.precision": "bf16", "engine.recompute": "block"},
    "transformer-fp32": {"config": "transformer_170m", "data.seq_len": 1024},
    "transformer-bf16": {"config": "transformer_170m", "data.seq_len": 1024, "engine.precision": "bf16"},
    "titans-fp32": {"config": "titans_170m"},
    "titans-bf16": {"config": "titans_170m", "engine.precision": "bf16"},
}
"""hope_170m, 512 tokens, one row and fp32 where a case does not say otherwise."""


def settings(case: str) -> tuple[RunConfig, int]:
    """The configuration of a case, and the documents in a row."""
    values = {
        "data.seq_len": 512,
        "engine.precision": "fp32",
        "engine.micro_batch_size": 1,
        "engine.device": "cpu",
        "engine.threads": 1,
        "engine.distributed_optimizer": "false",
        "engine.overlap_grad_reduce": "false",
        "engine.overlap_param_gather": "false",
        **CASES[case],
    }
    name, documents = values.pop("config", "hope_170m"), values.pop("documents", 1)
    values["train.global_batch_size"] = values["engine.micro_batch_size"]
    return load(ROOT / "configs" / f"{name}.toml", [f"{key}={value}" for key, value in values.items()]), documents


def measure(case: str) -> dict[str, Any]:
    """Peak MiB of a rank, measured and planned, and the planner's parts. Takes minutes of one core and up to 8 GiB."""
    from hope_pt.engine import TrainEngine, start, stop
    from hope_pt.testing import RandomBatch

    config, documents = settings(case)
    rows, length = config.train.global_batch_size, config.data.seq_len
    tokens = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, :: -(-length // documents)] = True
    batch = RandomBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length), starts)
    plan = start(config)
    before = psutil.Process().memory_info().rss
    engine = TrainEngine(config, plan)
    # The clocks go on without data until every slow level has moments and is within an interval.
    for _ in range(max(config.model.cms.periods) + 1):
        engine.optimizer.prepare()
        engine.optimizer.step(lr=0.0, grad_norm=0.0, drop=False)
    engine.step(batch)
    began = time.monotonic()
    resting = psutil.Process().memory_info().rss
    measured = (resting - before) / 2**20 + peak_mib(lambda: engine.step(batch))
    seconds = time.monotonic() - began
    stop(plan)
    found = rank_bytes(config, check_mesh(config, world_size=1), stage=0, documents=documents)
    parts = {**vars(found.weights), **{name: value for name, value in vars(found).items() if name not in ("stage", "weights")}}
    return {
        "measured_mib": round(measured),
        "planned_mib": round(found.total / 2**20),
        "error": round(found.total / 2**20 / measured - 1, 4),
        "parts_mib": {name: round(value / 2**20) for name, value in parts.items()},
        "step_s": round(seconds, 1),
    }


def in_fresh_process(case: str) -> dict[str, Any]:
    """`measure` in its own process, with a malloc that gives memory back."""
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.bench.memory", "--case", case]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **malloc})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """All cases, or one; 1 if one misses the goal."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--case", choices=CASES)
    case = arguments.parse_args().case
    if case:
        print(json.dumps(measure(case)))
        return 0
    results: dict[str, Any] = {"environment": environment(), "goal": GOAL, "cases": {}}
    for name in CASES:
        results["cases"][name] = in_fresh_process(name)
        print(name, results["cases"][name], flush=True)
    missed = [name for name, found in results["cases"].items() if abs(found["error"]) > GOAL]
    results["missed"] = missed
    print(f"written: {write_results('memory', results)}; missed: {missed or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
