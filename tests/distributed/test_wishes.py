"""Ranks that are asked to stop at different moments, or of which only one is asked, end at the same step with one checkpoint."""

import json
import os
import signal

import pytest

from hope_pt import train
from hope_pt.config.schema import CheckpointConfig, EvalConfig
from hope_pt.engine import step  # noqa: F401  the workers are forks: what is imported here they need not import
from hope_pt.testing import run_distributed, tiny_run
from hope_pt.testing.layouts import with_engine
from hope_pt.train.wishes import Wishes


def settings(out, **engine):
    config = tiny_run(steps=12, seq_len=32, global_batch_size=4).model_copy(
        update={
            "out": str(out),
            "checkpoint": CheckpointConfig(every=5),
            "eval": EvalConfig(every=0, at_start=False, sequences=2, diagnostics_every=0),
        }
    )
    return with_engine(config, **engine)


def session(launch, config, signals):
    """The run, in which rank r receives `signals[r]` = (step, signal) just before the ranks agree after that step."""
    plain, mine = Wishes.after_step, signals.get(launch.rank)

    def wrapped(self, record):
        if mine and record.step == mine[0]:
            os.kill(os.getpid(), mine[1])
        plain(self, record)

    Wishes.after_step = wrapped
    result = train.run(config, launch=launch)
    return result.steps, result.stopped


@pytest.mark.parametrize(
    ("world", "engine", "signals", "expected"),
    [
        (2, {}, {1: (3, signal.SIGUSR1)}, (3, "usr1")),
        (2, {"tensor_parallel": 2}, {0: (6, signal.SIGUSR1), 1: (7, signal.SIGUSR1)}, (6, "usr1")),
        (4, {"tensor_parallel": 2}, {2: (4, signal.SIGUSR1), 3: (4, signal.SIGTERM)}, (4, "term")),
        (2, {"pipeline_parallel": 2}, {1: (5, signal.SIGUSR2)}, (5, "usr2")),
    ],
    ids=["data-parallel", "tensor-parallel", "both, two signals", "pipeline, at a step that saves anyway"],
)
def test_all_ranks_end_at_one_step(world, engine, signals, expected, tmp_path):
    config = settings(tmp_path, **engine)
    assert run_distributed(session, world_size=world, timeout_s=120, args=(config, signals)) == [expected] * world
    run = tmp_path / config.name
    assert f"step-{expected[0]:08d}" in {path.name for path in (run / "checkpoints").iterdir()}
    assert json.loads((run / "status.json").read_text())["reason"] == expected[1]
    assert run_distributed(session, world_size=world, timeout_s=120, args=(config, {})) == [(12, "")] * world
