"""Measured values against the weights themselves, sketches of parts against those of the whole, and a session that is continued.

Norms are exact (fp64 sums, six digits are reported). The errors of sketches are random with a known standard deviation; EXPECTED of them
bounds every comparison.
"""

import copy
import json
import math
from typing import get_args

import pytest
import torch

from hope_kernels.newton_schulz import newton_schulz
from hope_pt.config.optim import MomentumConfig, OptimConfig, OptimizerName
from hope_pt.config.schema import CMSConfig, ModelConfig
from hope_pt.optim import Clocked
from hope_pt.optim.guards import Guards
from hope_pt.optim.held import Held
from hope_pt.optim.matrices import Matrices, view_of
from hope_pt.optim.measure import Measures
from hope_pt.optim.rules import make_rule
from hope_pt.optim.sketch import BUCKETS, sketch
from hope_pt.optim.watch import Watched
from hope_pt.testing.configs import tiny_model, tiny_run

SHAPES = {
    "blocks.0.cms.levels.0.norm.weight": (64,),
    "blocks.0.cms.levels.0.w_up.weight": (96, 64),
    "blocks.0.cms.levels.1.w_up.weight": (96, 64),
    "blocks.1.cms.levels.1.w_down.weight": (64, 96),
    "blocks.0.mixer.in_proj.weight": (40, 64),
    "blocks.1.mixer.in_proj.weight": (40, 64),
    "embedding.weight": (50, 64),
}
PERIODS = {name: 3 if ".levels.1." in name else 1 for name in SHAPES}
ROWS = {
    "level0/block0": ["blocks.0.cms.levels.0.norm.weight", "blocks.0.cms.levels.0.w_up.weight"],
    "level1/block0": ["blocks.0.cms.levels.1.w_up.weight"],
    "level1/block1": ["blocks.1.cms.levels.1.w_down.weight"],
    "matrix": ["blocks.0.mixer.in_proj.weight", "blocks.1.mixer.in_proj.weight"],
    "embedding": ["embedding.weight"],
}
MODEL = tiny_model(periods=(1, 3))
EXPECTED = 5  # standard deviations


def alone(tensor):
    """The sum over all ranks of one rank."""


def measures_of(held, *, every, model=MODEL, frozen=(), total=alone, shapes=SHAPES):
    return Measures(held, shapes=shapes, model=model, frozen=frozen, every=every, total=total, device=torch.device("cpu"))


def made(*, every, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    held = [Held(name, weight.data, tuple(weight.shape)) for name, weight in weights.items()]
    guards = Guards(held, shapes=SHAPES, model=MODEL, optim=tiny_run().optim, total=alone, device=torch.device("cpu"))
    groups = [{"params": [weight], "period": PERIODS[name]} for name, weight in weights.items()]
    inner = Clocked(torch.optim.AdamW(groups, lr=0.05))
    return Watched(inner, held=held, guards=guards, measures=measures_of(held, every=every)), weights


def step(watched, weights, number, *, skip=False):
    """One step; returns what it reports and the weights after it."""
    generator = torch.Generator().manual_seed(100 + number)
    for weight in weights.values():
        grad = torch.randn(weight.shape, generator=generator)
        weight.grad = None if skip else grad
    watched.skipped = skip
    watched.step()
    return watched.measured, {name: weight.detach().clone() for name, weight in weights.items()}


def flat(values, row):
    return torch.cat([values[name].flatten() for name in ROWS[row]]).double()


def test_every_value_is_what_the_weights_say():
    watched, weights = made(every=2)
    history = [{name: weight.detach().clone() for name, weight in weights.items()}]
    lines = [{}]
    for number in range(1, 13):
        measured, after = step(watched, weights, number)
        lines.append(measured)
        history.append(after)
    for call, line in enumerate(lines):
        for row, period in (("level0/block0", 1), ("level1/block1", 3), ("matrix", 1), ("embedding", 1)):
            due = call and (call % 2 == 0 if period == 1 else call % 3 == 0)
            assert (f"optim/{row}/update_norm" in line) == bool(due), (call, row)
            if not due:
                continue
            before, after = flat(history[call - period], row), flat(history[call], row)
            moved, start = after - before, flat(history[0], row)
            assert line[f"optim/{row}/update_norm"] == pytest.approx(moved.norm().item(), rel=6e-6)
            assert line[f"optim/{row}/update_ratio"] == pytest.approx((moved.norm() / before.norm()).item(), rel=6e-6)
            drift = ((after - start).norm() / start.norm()).item()
            # Both norms of the ratio come from sketches.
            assert line[f"optim/{row}/drift"] == pytest.approx(drift, rel=EXPECTED * math.sqrt(2 / (2 * BUCKETS)))
            if call > period:
                last = before - flat(history[call - 2 * period], row)
                cosine = (moved @ last / moved.norm() / last.norm()).item()
                assert line[f"optim/{row}/cosine"] == pytest.approx(cosine, abs=EXPECTED / math.sqrt(BUCKETS))
        if line:
            assert line["optim/level0/updates"] == call and line["optim/level0/since"] == 0
            assert line["optim/level1/updates"] == call // 3 and line["optim/level1/since"] == call % 3 if call >= 3 else True
            assert line["optim/nonfinite_share"] == 0 and line["optim/skipped_share"] == 0


@pytest.mark.parametrize(("period", "every", "expected"), [
    (1, 50, [50, 100, 150, 200]), (16, 50, [64, 112, 160, 208]), (64, 50, [64, 128, 192]), (3, 1, list(range(3, 210, 3))),
])  # fmt: skip
def test_a_level_is_measured_at_its_own_updates_about_every_n_steps(period, every, expected):
    measures = measures_of([], every=every, model=tiny_model(periods=(1, period)))
    calls = [call for call in range(1, 210) if measures.is_measured("level1/block0", call)]
    assert calls == expected


def test_only_what_is_reported_and_the_update_before_it_is_looked_at():
    watched, weights = made(every=6)
    looked = [call for call in range(1, 13) if watched.measures.needs(call)]
    assert looked == [3, 5, 6, 9, 11, 12]
    assert set(watched.measures.needs(5)) == {name for name in SHAPES if PERIODS[name] == 1}


def test_a_skipped_step_is_no_update_and_leaves_a_gap():
    watched, weights = made(every=1)
    lines = {number: step(watched, weights, number, skip=number in (2, 4, 5, 6))[0] for number in range(1, 10)}
    assert lines[2] == {} and lines[6] == {}, "a step without any update reports nothing"
    assert lines[3]["optim/level0/updates"] == 2 and lines[3]["optim/skipped_share"] == pytest.approx(1 / 3, rel=1e-5)
    assert "optim/matrix/cosine" not in lines[3] and "optim/matrix/cosine" in lines[9]
    assert lines[7]["optim/level1/updates"] == 1 and lines[7]["optim/level1/since"] == 4
    assert "optim/level1/block0/cosine" not in lines[9], "the interval before had no gradient"


def test_a_continued_session_reports_the_same_bits():
    for stop in range(1, 9):
        watched, weights = made(every=2)
        for number in range(1, stop + 1):
            step(watched, weights, number)
        other, twins = made(every=2, seed=1)
        other.inner.load_state_dict(copy.deepcopy(watched.inner.state_dict()))
        tensors, scalars = watched.measures.state()
        other.measures.load(tensors, json.loads(json.dumps(scalars, sort_keys=True)))
        for name, twin in twins.items():
            twin.data.copy_(weights[name].data)
        for number in range(stop + 1, 11):
            assert step(watched, weights, number)[0] == step(other, twins, number)[0], (stop, number)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_sketches_of_parts_add_up_to_that_of_the_whole(axis):
    value = torch.randn(36, 28, generator=torch.Generator().manual_seed(1))
    whole = sketch(Held("w", value, (36, 28)), value)[0]
    total = torch.zeros(BUCKETS)
    for index in range(1 if axis is None else 4):
        local = (value if axis is None else value.chunk(4, axis)[index]).contiguous()
        for first, end in ((0, 77), (77, local.numel())):
            part = local.reshape(-1)[first:end]
            place = {} if axis is None else {"axis": axis, "index": index, "count": 4}
            total += sketch(Held("w", part, tuple(local.shape), first=first, **place), part)[0]
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-5)
    assert not torch.equal(sketch(Held("other", value, (36, 28)), value)[0], whole)


@pytest.mark.parametrize("kind", ["random", "a few rows", "a few columns", "rank one"])
def test_inner_products_of_sketches_have_the_stated_error(kind):
    generator = torch.Generator().manual_seed(0)
    held = Held("blocks.0.w", torch.zeros(192, 256), (192, 256))
    errors, lengths = [], []
    for _ in range(60):
        u, v = torch.randn(2, 192, 256, generator=generator)
        if kind == "a few rows":
            u, v = (x * (torch.arange(192) % 8 == 0).unsqueeze(1) for x in (u, v))
        elif kind == "a few columns":
            u, v = (x * (torch.arange(256) % 8 == 0) for x in (u, v))
        elif kind == "rank one":
            u, v = (x[:, :1] * x[:1] for x in (u, v))
        v = u / u.norm() + v / v.norm()
        s_u, s_v = sketch(held, u, v).double()
        exact = (u.double() * v).sum()
        scale = ((u.norm() * v.norm()) ** 2 + exact**2).sqrt()
        errors.append(float((s_u @ s_v - exact) / scale))
        lengths.append(float(s_u.norm() / u.norm()) - 1)
    spread, stretch = (torch.tensor(found).std().item() for found in (errors, lengths))
    # The standard deviation of 60 draws is known to 9 %.
    assert spread == pytest.approx(BUCKETS**-0.5, rel=0.35) and abs(torch.tensor(errors).mean()) < 4 * spread / math.sqrt(60)
    assert stretch == pytest.approx((2 * BUCKETS) ** -0.5, rel=0.35)


def test_values_that_are_not_finite_are_counted():
    weight = torch.ones(64)
    held = Held("blocks.0.cms.levels.0.norm.weight", weight, (64,))
    measures = measures_of([held], every=1, shapes={"blocks.0.cms.levels.0.norm.weight": (64,)})
    measures.begin()
    before = weight.clone()
    weight[:16] = math.nan
    found = measures.take({held.name: before}, call=1, skipped=False)
    assert found["optim/nonfinite_share"] == 0.25 and math.isnan(found["optim/level0/block0/update_norm"])


def test_frozen_levels_have_no_row_and_periods_by_depth_have_their_own():
    assert set(measures_of([], every=1, frozen=(1,)).periods) == {"level0/block0", "matrix", "embedding"}
    model = ModelConfig(**{**MODEL.model_dump(), "cms": CMSConfig(hidden=24, periods=(1,), depth_periods=(4, 2))})
    shapes = {"blocks.0.cms.levels.0.w_up.weight": (96, 64), "blocks.1.cms.levels.0.w_up.weight": (96, 64)}
    held = [Held(name, torch.ones(96, 64), (96, 64)) for name in shapes]
    measures = measures_of(held, every=1, model=model, shapes=shapes)
    assert measures.periods == {"level0/block0": 4, "level0/block1": 2}
    found = measures.take({one.name: one.main for one in held}, call=2, skipped=False)
    assert set(found) >= {"optim/level0/block0/since", "optim/level0/block1/updates"}


@pytest.mark.parametrize("name", ["blocks.0.mixer.in_proj.weight", "blocks.1.cms.levels.1.w_down.weight"])
def test_the_residual_is_that_of_every_matrix_of_the_update(name):
    model = tiny_model(periods=(1, 1))
    width = model.width
    shape = (4 * width, width) if "in_proj" in name else (width, 24)
    generator = torch.Generator().manual_seed(2)
    before, moved = torch.randn(2, *shape, generator=generator)
    held = Held(name, before + 0.01 * moved, shape, matrices=Matrices(view_of(name, config=model)))
    measures = measures_of([held], every=1, model=model, shapes={name: shape})
    measures.begin()
    found = measures.take({name: before}, call=1, skipped=False)
    expected = []
    for matrix in view_of(name, config=model).to_matrices(moved.unsqueeze(0)).double():
        squares = torch.linalg.svdvals(matrix) ** 2
        expected.append((squares / squares.mean() - 1).square().mean().sqrt())
    row = next(key for key in found if key.endswith("/residual"))
    assert len(expected) == (4 if "in_proj" in name else 1)
    assert found[row] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)
    if len(expected) == 1:
        held.main.copy_(before + newton_schulz(moved, steps=30, coefficients=(1.5, -0.5, 0.0)))
        assert measures.take({name: before}, call=2, skipped=False)[row] < 1e-2


def test_rules_that_orthogonalise():
    deep = [name for name in get_args(OptimizerName) if name != "adamw"]
    optim = OptimConfig(momentum=MomentumConfig(preconditioner="newton_schulz"))
    assert [name for name in deep if make_rule(name, optim=optim).orthogonalises] == ["muon", "m3", "momentum", "delta_momentum"]
    assert [name for name in deep if make_rule(name, optim=OptimConfig()).orthogonalises] == ["muon", "m3"]
