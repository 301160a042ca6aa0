"""Dropped steps in a whole training on two ranks: what the run directory says, and that a resumed run decides the same.

The state is hurt for the length of one step, as in test_spikes.
"""

import json
import math
import shutil

import pytest

from hope_pt import train
from hope_pt.config.schema import CheckpointConfig, EvalConfig, RunConfig, SkipConfig
from hope_pt.engine import TrainEngine
from hope_pt.errors import DivergenceError
from hope_pt.report import metrics
from hope_pt.testing import run_distributed, tiny_model, tiny_run

STEPS = 16
FACTORS = {10: 30.0, 12: math.nan}
"""Step (from 1) -> what the norm before the head is multiplied by."""
CLOCKS = ("tokens_per_s", "data_s", "wall_s", "time")


def settings(out) -> RunConfig:
    config = tiny_run(model=tiny_model(periods=(1,)), steps=STEPS, seq_len=32, global_batch_size=4, micro_batch_size=2, lr=1e-3)
    return config.model_copy(
        update={
            "out": str(out),
            "train": config.train.model_copy(update={"skip": SkipConfig(sigmas=6.0, window=8, in_a_row=3)}),
            "checkpoint": CheckpointConfig(every=5, keep=9),
            "eval": EvalConfig(every=0, at_start=False, sequences=2, diagnostics_every=0, stragglers_every=4),
        }
    )


def session(launch, config: RunConfig, factors: dict[int, float]) -> str:
    """Trains to the end; what it ended with where that was divergence."""
    plain = TrainEngine.step

    def hurt(self, batch):
        factor = factors.get(self.num_steps_done + 1)
        if factor is None:
            return plain(self, batch)
        weight = self.parameters["final_norm.weight"].data
        kept = weight.clone()
        weight.mul_(factor)
        try:
            return plain(self, batch)
        finally:
            weight.copy_(kept)

    TrainEngine.step = hurt  # in a process of its own
    try:
        train.run(config, launch=launch)
    except DivergenceError as error:
        return str(error)
    return ""


def training_lines(run) -> list[dict]:
    lines = [record for record in metrics.read(run / "metrics.jsonl") if "loss" in record]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in lines]


@pytest.mark.distributed
def test_a_run_counts_what_it_drops_and_continues_with_the_same_decisions(tmp_path):
    config = settings(tmp_path)
    assert run_distributed(session, world_size=2, timeout_s=90, args=(config, FACTORS)) == ["", ""]
    run = tmp_path / config.name
    lines = training_lines(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["skipped"]] == [10, 12]
    assert [line["skips"] for line in lines] == [0] * 9 + [1, 1] + [2] * 5
    assert lines[9]["loss"] > 0 and lines[9]["grad_norm"] > 0, "a spike is a number"
    assert lines[11]["loss"] is None and lines[11]["grad_norm"] is None
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    report = [record for record in metrics.read(run / "metrics.jsonl") if "stragglers/slowest_rank" in record]
    assert [record["step"] for record in report] == [4, 8, 12, 16]
    assert all(0 < record["stragglers/own_s_median"] <= record["stragglers/own_s_max"] for record in report)

    # Stopped after a step within the history, and after the dropped spike.
    for step_done in (10, 5):
        for name in (f"step-{later:08d}" for later in range(step_done + 1, STEPS + 1)):
            shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
        assert run_distributed(session, world_size=2, timeout_s=90, args=(config, FACTORS)) == ["", ""]
        assert training_lines(run) == lines
        assert "was changed by hand or lost" not in (run / "logs" / "rank-0.log").read_text()


@pytest.mark.distributed
def test_a_run_that_drops_too_much_ends_with_a_sentence(tmp_path):
    config = settings(tmp_path)
    said = run_distributed(session, world_size=2, timeout_s=90, args=(config, dict.fromkeys((6, 7, 8), math.nan)))
    assert said[0] == said[1]
    assert said[0].startswith("step 8: loss = nan, grad_norm = nan, lr = ")
    assert "3 steps in a row were dropped (train.skip.in_a_row = 3); the state was not saved" in said[0]
    run = tmp_path / config.name
    assert [line["step"] for line in training_lines(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((run / "status.json").read_text())["state"] == "diverged"
