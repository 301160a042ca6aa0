"""Which changes a run survives: what decides losses must not change; the differing keys are named."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hope_pt.checkpoint import Checkpoint
from hope_pt.config import to_toml
from hope_pt.errors import CheckpointError, ConfigError, DataError
from hope_pt.testing.configs import tiny_run
from hope_pt.train import resume, rng
from hope_pt.train.state import FORMAT


def changed(config, **sections):
    """`config` with fields replaced, for example optim={"lr": 1.0}."""
    update = {
        name: getattr(config, name).model_copy(update=values) if isinstance(values, dict) else values for name, values in sections.items()
    }
    return config.model_copy(update=update)


def stored(config, *, step=4, fingerprint="abc", **meta) -> Checkpoint:
    return Checkpoint(
        step=step,
        meta={"format": FORMAT, "data_parallel": 1, "config": to_toml(config), "fingerprint": fingerprint, **meta},
        path=Path("runs/x/step"),
    )


def test_the_same_configuration_and_data_continue():
    resume.check(tiny_run(), checkpoint=stored(tiny_run()), fingerprint="abc", data_parallel=1)


def test_another_number_of_data_parallel_ranks_is_said(caplog):
    resume.check(tiny_run(), checkpoint=stored(tiny_run()), fingerprint="abc", data_parallel=2)
    assert "continuing with data-parallel ranks: 1 -> 2: losses agree with the uninterrupted run up to rounding" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": {"every": 7}},
        {"eval": {"every": 7}},
        {"track": {"wandb": True}},
        {"out": "elsewhere"},
        {"data": {"num_workers": 2}},
    ],
    ids=str,
)
def test_what_decides_no_loss_may_change(change, caplog):
    resume.check(changed(tiny_run(), **change), checkpoint=stored(tiny_run()), fingerprint="abc", data_parallel=1)
    assert caplog.text == ""


def test_updates_are_measured_from_the_first_step_on_or_not_at_all(caplog):
    off, on = changed(tiny_run(), eval={"levels_every": 0}), changed(tiny_run(), eval={"levels_every": 7})
    with pytest.raises(ConfigError, match="eval.levels_every: 0 -> 7"):
        resume.check(on, checkpoint=stored(off), fingerprint="abc", data_parallel=1)
    for config, before in ((off, on), (on, changed(on, eval={"levels_every": 3})), (off, off)):
        resume.check(config, checkpoint=stored(before), fingerprint="abc", data_parallel=1)
    resume.check_config(on, stored=off, step=0)
    assert caplog.text == ""


def test_the_layout_may_change_and_the_log_says_what_that_means(caplog):
    resume.check(changed(tiny_run(), engine={"micro_batch_size": 2}), checkpoint=stored(tiny_run()), fingerprint="abc", data_parallel=1)
    assert "engine.micro_batch_size: 1 -> 2" in caplog.text and "not bit for bit" in caplog.text


def test_other_keys_are_refused_and_all_are_named():
    other = changed(tiny_run(), optim={"lr": 0.5}, train={"global_batch_size": 8, "steps": 8}, data={"seed": 3}, checkpoint={"every": 9})
    with pytest.raises(ConfigError) as caught:
        resume.check(other, checkpoint=stored(tiny_run()), fingerprint="abc", data_parallel=1)
    message = str(caught.value)
    for line in ("optim.lr: 0.01 -> 0.5", "train.global_batch_size: 4 -> 8", "data.seed: 0 -> 3"):
        assert line in message
    assert "checkpoint.every" not in message and "\n" not in message


def test_other_data_is_refused_with_both_fingerprints():
    with pytest.raises(DataError, match="fingerprint new.*fingerprint abc up to step 4"):
        resume.check(tiny_run(), checkpoint=stored(tiny_run()), fingerprint="new", data_parallel=1)


def test_another_state_format_is_refused():
    with pytest.raises(CheckpointError, match="state format 1"):
        resume.check(tiny_run(), checkpoint=stored(tiny_run(), format=1), fingerprint="abc", data_parallel=1)


@pytest.mark.parametrize(("schedule", "step", "allowed"), [("cosine", 4, False), ("cosine", 2, True), ("wsd", 4, True), ("wsd", 99, False)])
def test_the_length_may_change_while_the_past_keeps_its_learning_rates(schedule, step, allowed):
    config = changed(tiny_run(steps=100), optim={"schedule": schedule})
    longer = changed(config, train={"steps": 200})
    if allowed:
        resume.check(longer, checkpoint=stored(config, step=step), fingerprint="abc", data_parallel=1)
    else:
        with pytest.raises(ConfigError, match="train.steps: 100 -> 200"):
            resume.check(longer, checkpoint=stored(config, step=step), fingerprint="abc", data_parallel=1)


def test_the_generators_continue_where_they_were():
    def draw():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    np.random.standard_normal()
    random.gauss(0, 1)
    states = json.loads(json.dumps(rng.capture()))
    first = draw()
    assert draw() != first
    rng.restore(states)
    assert draw() == first


def test_code_that_has_changed_is_said_and_not_refused(caplog):
    before = stored(tiny_run(), code_version="4f1c2a90d3b7")
    resume.compare_code(before, now="4f1c2a90d3b7")
    resume.compare_code(stored(tiny_run()), now="4f1c2a90d3b7")
    assert caplog.text == ""
    resume.compare_code(before, now="0a1b2c3d4e5f+changes")
    assert "continuing with code 0a1b2c3d4e5f+changes; runs/x/step was made with code 4f1c2a90d3b7" in caplog.text
