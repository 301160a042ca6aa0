"""The loop against an engine of three lines: numbers, order of hooks, where it stops, and that no NaN is ever saved."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.config.schema import CheckpointConfig
from hope_pt.engine.sharding import Shard
from hope_pt.errors import DivergenceError
from hope_pt.report import metrics
from hope_pt.report.metrics import MetricsFile
from hope_pt.train.hooks.base import Hook, StepRecord
from hope_pt.train.hooks.checkpoint import CheckpointHook
from hope_pt.train.hooks.measure import MeasureHook
from hope_pt.train.hooks.metrics import MetricsHook
from hope_pt.train.loop import fit
from hope_pt.train.wishes import Wishes


@dataclass
class Result:
    loss: float
    lr: float = 0.1
    grad_norm: float = 2.0
    skipped: bool = False


class FakeEngine:
    """Loss of step n is 1 / n, or what `losses` says."""

    def __init__(self, *, done: int = 0, losses: dict[int, float] | None = None):
        self.num_steps_done = done
        self.batches = []
        self._losses = losses or {}

    def step(self, batch) -> Result:
        self.batches.append(batch)
        self.num_steps_done += 1
        return Result(loss=self._losses.get(self.num_steps_done, 1 / self.num_steps_done))

    def capture(self, record: StepRecord):
        weight = float("inf") if record.step in self._losses and self._losses[record.step] < 0 else float(record.step)
        return [Shard("model.w", torch.tensor([weight]))], {"step": record.step}


class Spy(Hook):
    def __init__(self, log: list):
        self._log = log

    def start(self, step):
        self._log.append(("start", step))

    def after_step(self, record):
        self._log.append(("step", record.step, record.tokens))


def saver(engine, root, *, every, last_step, sinks=()):
    """A hook that nobody asks for anything."""
    settings = {"config": CheckpointConfig(every=every, keep=9), "last_step": last_step, "wishes": Wishes(root), "committed": 0}
    return CheckpointHook(engine.capture, root=root, layout="", sinks=sinks, **settings)


def test_the_loop_takes_one_batch_a_step_from_where_the_engine_is_to_the_end():
    engine, log = FakeEngine(done=3), []
    fit(engine, batches=iter("abcdefg"), num_steps=6, tokens_per_step=10, hooks=[Spy(log)])
    assert engine.batches == ["a", "b", "c"]
    assert log == [("start", 3), ("step", 4, 40), ("step", 5, 50), ("step", 6, 60)]


def test_metrics_lines_have_the_agreed_keys_and_exact_floats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fit(FakeEngine(), batches=iter(range(9)), num_steps=7, tokens_per_step=3, wall_s=5.0, hooks=[MetricsHook([MetricsFile(path)])])
    records = metrics.read(path)
    assert [record["step"] for record in records] == list(range(1, 8))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "wall_s", "time"} <= records[0].keys()
    assert metrics.series(records, key="loss")[1] == [1 / n for n in range(1, 8)]
    assert records[0]["wall_s"] > 5.0 and records[-1]["tokens"] == 21


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(bad, tmp_path):
    engine = FakeEngine(losses={4: bad})
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    saving = saver(engine, tmp_path / "c", every=2, last_step=10, sinks=[sink])
    with pytest.raises(DivergenceError, match="step 4: loss = (nan|inf).*lower optim.lr"):
        fit(engine, batches=iter(range(99)), num_steps=10, tokens_per_step=1, hooks=[MetricsHook([sink]), saving])
    assert [record["step"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert checkpoint.load_newest(tmp_path / "c").step == 2


def test_one_dropped_gradient_is_recorded_and_three_in_a_row_stop_the_run(tmp_path):
    class Dropping(FakeEngine):
        def step(self, batch):
            loss = super().step(batch).loss
            dropped = self.num_steps_done in (2, 5, 6, 7)
            return Result(loss=loss, grad_norm=math.inf if dropped else 1.0, skipped=dropped)

    path = tmp_path / "m"
    with pytest.raises(DivergenceError, match="step 7: .*grad_norm = inf"):
        fit(Dropping(), batches=iter(range(99)), num_steps=10, tokens_per_step=1, hooks=[MetricsHook([MetricsFile(path)])])
    records = metrics.read(path)
    assert [record["skipped"] for record in records] == [False, True, False, False, True, True]
    assert records[1]["grad_norm"] is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    engine = FakeEngine(losses={4: -1.0})
    saving = saver(engine, tmp_path, every=2, last_step=10)
    with pytest.raises(DivergenceError, match="step 4: model.w has values that are not finite"):
        fit(engine, batches=iter(range(99)), num_steps=10, tokens_per_step=1, hooks=[saving])
    assert checkpoint.load_newest(tmp_path).step == 2


@pytest.mark.parametrize(("every", "steps", "expected"), [(0, 5, [5]), (2, 5, [2, 4, 5]), (5, 5, [5])])
def test_checkpoints_are_saved_where_due_and_once_at_the_end(every, steps, expected, tmp_path):
    engine = FakeEngine()
    saving = saver(engine, tmp_path, every=every, last_step=steps)
    fit(engine, batches=iter(range(99)), num_steps=steps, tokens_per_step=1, hooks=[saving])
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == expected


@pytest.mark.parametrize(
    ("options", "done", "expected"),
    [
        ({"every": 2, "at_start": True, "last_step": 5}, 0, [0, 2, 4, 5]),
        ({"every": 2, "at_start": True, "last_step": 5}, 2, [4, 5]),
        ({"every": 0, "last_step": 5}, 0, [5]),
        ({"every": 5, "last_step": 5}, 0, [5]),
    ],
)
def test_measurements_happen_where_due(options, done, expected, tmp_path):
    path = tmp_path / "metrics.jsonl"
    hook = MeasureHook(lambda: {"eval/x": 0.5}, sinks=[MetricsFile(path)], **options)
    fit(FakeEngine(done=done), batches=iter(range(99)), num_steps=5, tokens_per_step=1, hooks=[hook])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": step, "eval/x": 0.5} for step in expected]
