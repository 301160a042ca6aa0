"""Guard rails and measurements do not depend on the layout: values, weights under caps, frozen levels, and checkpoints in between.

Periods 1, 2 and 3; the caps are small enough to act at every update of the slow levels. Sums are in fp64 and sketches are linear, so values
agree to the rounding of the weights: ROUNDED relative, for cosines and residuals absolute.
"""

import functools
import math

import pytest
import torch

from hope_pt.config.schema import RunConfig
from hope_pt.engine import Launch
from hope_pt.nn.init import init_norm
from hope_pt.testing import run_distributed, tiny_run
from hope_pt.testing.layouts import part_at, running, with_engine

STEPS = 6
ROUNDED = 2e-3
CAPS = {"level_step_cap": 0.01, "level_total_cap": 0.02}
LAYOUTS = {
    "tp2": {"tensor_parallel": 2, "micro_batch_size": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {"micro_batch_size": 2},
    "dp2 distributed": {"distributed_optimizer": True},
}
MUON = ("tp2", "dp2 distributed")


def config_of(layout: dict, **optim) -> RunConfig:
    run = with_engine(tiny_run(global_batch_size=4), **layout)
    # With a small epsilon the sign of a gradient that is zero up to rounding decides a whole step of AdamW.
    settings = run.optim.model_copy(update={"eps": 1e-3, **optim})
    return run.model_copy(update={"optim": settings, "eval": run.eval.model_copy(update={"levels_every": 1})})


def train(launch: Launch, config: RunConfig, *, key: str, stored=None, first: int = 0, steps: int = STEPS):
    """(measured values of every step, final weights, state) of steps first to `steps`, from a stored state."""
    with running(config, launch=launch, key=key) as trainer:
        if stored:
            trainer.load_state(*stored)
        lines = []
        for step in range(first, steps):
            trainer.step(part_at(trainer, step))
            lines.append(dict(trainer.optimizer.watched.measured))
        return lines, trainer.export(), trainer.state()


def train_each(launch: Launch, jobs: dict) -> dict:
    return {name: train(launch, config, key=name.replace(" ", "-"), **more) for name, (config, more) in jobs.items()}


@functools.cache
def alone(**optim):
    return train(Launch(), config_of({}, **optim), key="")


@functools.cache
def together():
    jobs = {name: (config_of(layout, **CAPS), {}) for name, layout in LAYOUTS.items()}
    jobs |= {f"muon {name}": (config_of(layout, name="muon"), {}) for name, layout in LAYOUTS.items() if name in MUON}
    # Owners of whole parameters: the sums of the caps are over the pieces of all ranks.
    jobs["capped muon dp2 distributed"] = (config_of(LAYOUTS["dp2 distributed"], name="muon", **CAPS), {})
    jobs["resumed"] = (
        config_of(LAYOUTS["tp2"], **CAPS),
        {"stored": train(Launch(), config_of({}, **CAPS), key="", steps=5)[2], "first": 5},
    )
    return run_distributed(train_each, world_size=2, timeout_s=100, args=(jobs,))


def assert_same_lines(found, expected):
    assert [set(line) for line in found] == [set(line) for line in expected]
    for call, (line, other) in enumerate(zip(found, expected, strict=True), 1):
        for key, value in other.items():
            limit = {"abs": ROUNDED} if key.endswith(("/cosine", "/residual")) else {"rel": ROUNDED}
            assert line[key] == pytest.approx(value, **limit), (call, key)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"muon {name}" for name in MUON), "capped muon dp2 distributed"])
def test_measured_values_do_not_depend_on_the_layout(layout):
    optim = ({"name": "muon"} if "muon" in layout else {}) | ({} if layout.startswith("muon") else CAPS)
    expected, weights, _ = alone(**optim)
    for rank in together():
        lines, found, _ = rank[layout]
        assert_same_lines(lines, expected)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    row = "level1/block1"
    assert ("optim/matrix/residual" in expected[0]) == ("muon" in layout) and f"optim/{row}/cosine" in expected[3]


@pytest.mark.distributed
def test_a_state_saved_by_one_process_continues_on_two():
    expected, weights, _ = alone(**CAPS)
    lines, found, _ = together()[0]["resumed"]
    assert_same_lines(lines, expected[5:])
    assert any(key.endswith("/cosine") and "level2" in key for key in lines[0]), "the sketch of the last update was lost"
    assert all(
        math.isclose(line[key], other[key]) for line, other in zip(lines, expected[5:], strict=True) for key in line if "caps" in key
    )
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)


@pytest.mark.distributed
def test_caps_act_at_the_cap_and_are_counted():
    lines, weights, (tensors, scalars) = alone(**CAPS)
    free, _, _ = alone()
    assert lines[1]["optim/level1/step_caps"] == lines[2]["optim/level2/step_caps"] == 6, "three matrices in two blocks"
    assert lines[-1]["optim/level1/total_caps"] == scalars["watch"]["acted"]["1"][1] > 0
    starts = [name for name in tensors if name.endswith(".start") and name.startswith("optim.")]
    assert len(starts) == 2 * 2 * 3
    for name in starts:
        parameter = name.removeprefix("optim.").removesuffix(".start")
        size = max(float(tensors[name].norm()), init_norm(parameter, tensors[name].shape, config=config_of({}).model))
        assert float((weights[parameter] - tensors[name]).norm()) <= 0.02 * size * (1 + 1e-5)
    for number, period in ((1, 2), (2, 3)):
        key = f"optim/level{number}/block0/update_ratio"
        assert lines[period - 1][key] < 0.0101 < free[period - 1][key], "the norm of the level also moves, without a cap"
    assert lines[0]["optim/level0/block0/update_ratio"] == free[0]["optim/level0/block0/update_ratio"]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {"precision": "bf16"}])
def test_frozen_levels_are_bit_identical(layout):
    config = config_of(layout, freeze_levels=(0, 2), weight_decay=0.5)
    with running(config, launch=Launch(), key="") as trainer:
        start = trainer.export()
        for step in range(4):
            trainer.step(part_at(trainer, step))
        end, (tensors, _) = trainer.export(), trainer.state()
    frozen = [name for name in start if ".levels.0." in name or ".levels.2." in name]
    assert len(frozen) == 2 * 2 * 4
    for name in start:
        assert torch.equal(start[name], end[name]) == (name in frozen), name
    assert not [name for name in tensors if name.startswith("optim.") and any(one in name for one in frozen)]
