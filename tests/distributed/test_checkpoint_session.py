"""`hope train` with saves in the background on two ranks: the run directory continues in one process, and the other way round."""

import shutil

import pytest

from hope_pt import train
from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import CheckpointConfig, EvalConfig
from hope_pt.engine import step  # noqa: F401  the workers are forks: what is imported here they need not import
from hope_pt.report import metrics
from hope_pt.testing import LAYOUT, run_distributed, tiny_run
from hope_pt.testing.layouts import with_engine

STEPS = 6


def settings(out, *, asynchronous: bool, **engine):
    config = tiny_run(steps=STEPS, seq_len=32, global_batch_size=2).model_copy(
        update={
            "out": str(out),
            "optim": OptimConfig(lr=1e-2, warmup_steps=2, clip=0.05, eps=1e-3),
            "checkpoint": CheckpointConfig(every=2, asynchronous=asynchronous),
            "eval": EvalConfig(every=0, at_start=False, sequences=2, diagnostics_every=0),
        }
    )
    return with_engine(config, **engine)


def session(launch, config):
    return train.run(config, launch=launch).steps


def losses(run) -> list[float]:
    steps, values = metrics.series(metrics.read(run / "metrics.jsonl"), key="loss")
    assert steps == list(range(1, STEPS + 1))
    return values


@pytest.mark.parametrize("ranks", [2, 1], ids=["two then one", "one then two"])
def test_a_run_continues_with_another_number_of_ranks(ranks, tmp_path):
    degrees = {2: {"tensor_parallel": 2}, 1: {}}
    first = settings(tmp_path, asynchronous=True, **degrees[ranks])
    assert run_distributed(session, world_size=ranks, timeout_s=90, args=(first,)) == [STEPS] * ranks
    run = tmp_path / first.name
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000002", "step-00000004", "step-00000006"]
    uninterrupted = losses(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    other = 3 - ranks
    second = settings(tmp_path, asynchronous=False, **degrees[other])
    assert run_distributed(session, world_size=other, timeout_s=90, args=(second,)) == [STEPS] * other
    assert losses(run) == pytest.approx(uninterrupted, rel=LAYOUT)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
