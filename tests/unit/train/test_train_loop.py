"""The loop against an engine of three lines: numbers, order of hooks, where it stops, and that no NaN is ever saved."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.config.schema import CheckpointConfig, SkipConfig
from hope_pt.engine.sharding import Shard
from hope_pt.errors import DivergenceError
from hope_pt.optim.spikes import SkipRule
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
    grad_norm: float
    skipped: bool
    skips: int
    diverged: str
    lr: float = 0.1


class FakeEngine:
    """Loss of step n is 1 / n, or what `losses` says; its gradient norm is 2, or what `norms` says. The rule for dropped steps is real."""

    def __init__(
        self,
        *,
        done: int = 0,
        losses: dict[int, float] | None = None,
        norms: dict[int, float] | None = None,
        skip: SkipConfig | None = None,
    ):
        self.num_steps_done = done
        self.batches = []
        self._losses, self._norms = losses or {}, norms or {}
        self._skips = SkipRule(skip or SkipConfig())

    def step(self, batch) -> Result:
        self.batches.append(batch)
        self.num_steps_done += 1
        step = self.num_steps_done
        loss, norm = self._losses.get(step, 1 / step), self._norms.get(step, 2.0)
        verdict = self._skips.judge(loss=loss, norm=norm)
        return Result(loss, norm, verdict.dropped, self._skips.skips, verdict.diverged)

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
    settings = {"config": CheckpointConfig(every=every, keep=9), "last_step": last_step, "wishes": Wishes(root, signals=()), "committed": 0}
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
def test_losses_that_are_not_finite_are_recorded_and_three_in_a_row_stop_the_run(bad, tmp_path):
    engine = FakeEngine(losses={3: bad, 5: bad, 6: bad, 7: bad})
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    saving = saver(engine, tmp_path / "c", every=2, last_step=10, sinks=[sink])
    with pytest.raises(DivergenceError, match="step 7: loss = (nan|inf), .*: 3 steps in a row were dropped .*lower optim.lr"):
        fit(engine, batches=iter(range(99)), num_steps=10, tokens_per_step=1, hooks=[MetricsHook([sink]), saving])
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6], "no hook sees the last one"
    assert [record["skipped"] for record in records] == [False, False, True, False, True, True]
    assert [record["skips"] for record in records] == [0, 0, 1, 1, 2, 3]
    assert [record["loss"] is None for record in records] == [record["skipped"] for record in records]


def test_gradients_that_are_not_finite_are_recorded_and_too_many_of_the_window_stop_the_run(tmp_path):
    engine = FakeEngine(norms=dict.fromkeys((2, 4, 6), math.inf), skip=SkipConfig(window=8, in_window=3))
    path = tmp_path / "m"
    with pytest.raises(DivergenceError, match="step 6: .*grad_norm = inf.*: 3 of the last 8 steps were dropped"):
        fit(engine, batches=iter(range(99)), num_steps=10, tokens_per_step=1, hooks=[MetricsHook([MetricsFile(path)])])
    records = metrics.read(path)
    assert [record["skipped"] for record in records] == [False, True, False, True, False]
    assert [record["grad_norm"] for record in records] == [2.0, None, 2.0, None, 2.0]
    assert records[1]["loss"] == 1 / 2


def test_a_spike_keeps_its_numbers_in_the_metrics(tmp_path):
    engine = FakeEngine(norms={10: 50.0}, skip=SkipConfig(sigmas=6.0, window=8))
    path = tmp_path / "m"
    fit(engine, batches=iter(range(99)), num_steps=11, tokens_per_step=1, hooks=[MetricsHook([MetricsFile(path)])])
    records = metrics.read(path)
    assert [record["step"] for record in records if record["skipped"]] == [10]
    assert records[9]["grad_norm"] == 50.0 and records[9]["loss"] == 1 / 10


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
