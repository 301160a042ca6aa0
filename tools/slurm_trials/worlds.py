"""One run on 4, then 2, then 8 ranks, beside one on 4: the same global batches, and losses that agree up to rounding."""

import random
from typing import Any

from tools.slurm_trials.cluster import Run
from tools.slurm_trials.training import Bench, finish, ledger, records, sample_differences

WORLDS = {"tp2dp2": 4, "dp2": 2, "tp2dp4": 8}
TOLERANCE = 1e-6
"""Relative; sums over ranks of fp32 values are taken in another order."""


def trials(bench: Bench, *, seed: int) -> dict[str, Any]:
    """Stops the run twice, at random steps, and continues it in the next layout."""
    draw, run, third = random.Random(seed), bench.make("worlds"), bench.steps // 3
    first = next(iter(WORLDS))
    reference = bench.reference(first).outcome
    until = [third + draw.randrange(-2, 3), 2 * third + draw.randrange(-2, 3)]
    ends: dict[str, int] = {}
    for layout, step in zip(WORLDS, [*until, bench.steps], strict=True):
        job = bench.submit(run, layout=layout)
        if step < bench.steps:
            run.wait_for_step(step, seconds=200)
            (run.path / "STOP").touch()
            assert run.wait(job, seconds=120) == "COMPLETED" and run.actions[-1] == "stopped", run.log
        else:
            finish(run, job)
        ends[layout] = max(record["step"] for record in records(run))
    ours, theirs = _losses(run), {line["step"]: line["loss"] for line in reference.metrics if "loss" in line}
    violations = sample_differences(reference.ledger, ledger(run), count=reference.consumed)
    apart = {step: abs(ours[step] - loss) / abs(loss) for step, loss in theirs.items() if step in ours}
    if len(apart) != bench.steps:
        violations.append(f"{len(apart)} of {bench.steps} steps are in both metrics.jsonl")
    violations += [f"step {step}: losses {ours[step]} and {theirs[step]}" for step, value in apart.items() if value > TOLERANCE]
    return {
        "steps": bench.steps,
        "ranks_until_step": {WORLDS[layout]: step for layout, step in ends.items()},
        "samples": reference.consumed,
        "largest_relative_difference_of_losses": max(apart.values()),
        "violations": violations,
    }


def _losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}
