"""Caps act exactly at the cap, on whole matrices however they are divided, and never on what they are not for; frozen levels stay."""

import math

import pytest
import torch

from hope_pt.config.optim import OptimConfig
from hope_pt.nn.init import init_tensor
from hope_pt.optim import Clocked
from hope_pt.optim.guards import Guards, frozen
from hope_pt.optim.held import Held
from hope_pt.optim.nested import Nested
from hope_pt.optim.watch import Watched
from hope_pt.testing.configs import tiny_model

MODEL = tiny_model(periods=(1, 2, 3))
FAST, SLOW, SLOWEST = (f"blocks.0.cms.levels.{level}.w_up.weight" for level in range(3))
NORM, OTHER = "blocks.1.cms.levels.1.norm.weight", "blocks.0.mixer.in_proj.weight"
SHAPES = {FAST: (24, 16), SLOW: (24, 16), SLOWEST: (24, 16), NORM: (16,), OTHER: (40, 16)}


def alone(tensor):
    """The sum over all ranks of one rank."""


def made(*, lr=0.5, seed=0, **optim):
    """Watched plain gradient descent on one parameter of every kind, and the parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    held = [Held(name, weight.data, tuple(weight.shape)) for name, weight in weights.items()]
    config = OptimConfig(**optim)
    guards = Guards(held, shapes=SHAPES, model=MODEL, optim=config, total=alone, device=torch.device("cpu"))
    periods = {FAST: 1, SLOW: 2, SLOWEST: 3, NORM: 2, OTHER: 1}
    groups = [{"params": [weight], "period": periods[name]} for name, weight in weights.items()]
    return Watched(Clocked(torch.optim.SGD(groups, lr=lr)), held=held, guards=guards, measures=None), weights


def step(watched, weights, number, *, size=1.0, dropped=()):
    generator = torch.Generator().manual_seed(100 + number)
    for name, weight in weights.items():
        grad = size * torch.randn(weight.shape, generator=generator)
        weight.grad = None if name in dropped else grad
    watched.step()


def run(watched, weights, steps, **settings):
    for number in range(1, steps + 1):
        step(watched, weights, number, **settings)


def relative(value, reference):
    return float((value - reference).detach().double().norm() / reference.detach().double().norm())


def test_without_caps_every_bit_is_as_without_guards():
    guarded, plain = made(), made(level_step_cap=1e9, level_total_cap=1e9)
    twin = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in guarded[1].items()}
    periods = {FAST: 1, SLOW: 2, SLOWEST: 3, NORM: 2, OTHER: 1}
    clocked = Clocked(torch.optim.SGD([{"params": [weight], "period": periods[name]} for name, weight in twin.items()], lr=0.5))
    for watched, weights in (guarded, plain, (clocked, twin)):
        run(watched, weights, 7)
    for name in SHAPES:
        assert torch.equal(twin[name], guarded[1][name]), name
        assert torch.equal(twin[name], plain[1][name]), f"a cap that is never reached changed {name}"


def test_the_step_cap_shortens_an_update_to_exactly_the_cap_and_keeps_its_direction():
    watched, weights = made(level_step_cap=0.03)
    free, others = made()
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    run(watched, weights, 2)
    run(free, others, 2)
    assert relative(weights[SLOW], start[SLOW]) == pytest.approx(0.03, rel=1e-5)
    moved, wanted = weights[SLOW] - start[SLOW], others[SLOW] - start[SLOW]
    assert float((moved * wanted).detach().sum() / (moved.norm() * wanted.norm()).detach()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(weights[SLOWEST], start[SLOWEST]), "its interval is open"
    for name in (FAST, NORM, OTHER):
        assert torch.equal(weights[name], others[name]), f"{name} has no cap"
    assert watched.guards.acted == {1: [1, 0], 2: [0, 0]}
    assert watched.guards.counts() == {"optim/level1/step_caps": 1, "optim/level2/step_caps": 0}


def test_an_update_just_below_the_cap_is_untouched():
    free, others = made()
    start = others[SLOW].detach().clone()
    run(free, others, 2)
    size = relative(others[SLOW], start)
    for share, acts in ((1 + 1e-5, 0), (1 - 1e-5, 1)):
        watched, weights = made(level_step_cap=size * share)
        run(watched, weights, 2)
        assert watched.guards.acted[1][0] == acts
        assert torch.equal(weights[SLOW], others[SLOW]) == (not acts)


def test_the_total_cap_holds_a_matrix_on_its_sphere_and_lets_it_come_back():
    watched, weights = made(level_total_cap=0.2)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for number in range(1, 13):
        step(watched, weights, number)
        for name in (SLOW, SLOWEST):
            assert relative(weights[name], start[name]) <= 0.2 * (1 + 1e-5)
    assert relative(weights[SLOW], start[SLOW]) == pytest.approx(0.2, rel=1e-5)
    assert watched.guards.acted[1][1] == 6 and watched.guards.acted[2][1] == 4
    assert relative(weights[FAST], start[FAST]) > 0.5
    weights[SLOW].grad = (weights[SLOW] - start[SLOW]).detach()
    for name in (FAST, SLOWEST, NORM, OTHER):
        weights[name].grad = None
    watched.step()
    watched.step()
    assert relative(weights[SLOW], start[SLOW]) == pytest.approx(0.1, rel=1e-4), "half of the way back was free to go"


def test_both_caps_together_keep_both_promises():
    watched, weights = made(level_step_cap=0.07, level_total_cap=0.1)
    start = before = weights[SLOW].detach().clone()
    for number in range(1, 9):
        step(watched, weights, number)
        assert relative(weights[SLOW], before) <= 0.07 * (1 + 1e-5) and relative(weights[SLOW], start) <= 0.1 * (1 + 1e-5)
        before = weights[SLOW].detach().clone()
    assert min(watched.guards.acted[1]) > 0


def test_a_matrix_that_begins_at_zero_is_held_like_a_new_one():
    """As the w_down of a stacked level: two updates, each of at most the share of what a new matrix's norm is, and not of its own."""
    watched, weights = made(level_step_cap=0.01)
    weights[SLOW].data.zero_()
    new = init_tensor(SLOW, SHAPES[SLOW], config=MODEL, seed=0).norm()
    norms = []
    for number in range(1, 5):
        before = weights[SLOW].detach().clone()
        step(watched, weights, number)
        norms.append(float((weights[SLOW].detach() - before).norm() / new))
    assert norms == [0, pytest.approx(0.01, rel=0.1), 0, pytest.approx(0.01, rel=0.1)]
    assert norms[1] == pytest.approx(norms[3], rel=1e-5) and watched.guards.acted[1] == [2, 0]
    both, others = made(level_step_cap=0.01, level_total_cap=0.015)
    others[SLOW].data.zero_()
    run(both, others, 12)
    assert float(others[SLOW].detach().norm() / new) == pytest.approx(0.015, rel=0.1) and both.guards.acted[1][1] > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_shards_are_limited_by_the_norm_of_the_whole(axis):
    """Two shards, one of them cut once more as a distributed optimizer does, against the whole matrix in one piece."""
    generator = torch.Generator().manual_seed(3)
    before, after = torch.randn(24, 16, generator=generator), torch.randn(24, 16, generator=generator)
    optim = OptimConfig(level_step_cap=0.05, level_total_cap=0.04)
    total = torch.zeros(1, 5, dtype=torch.float64)

    def guards_of(value_before, value_after, sum_up, **place):
        main = value_before.clone()
        held = Held(SLOW, main, **place)
        guards = Guards([held], shapes={SLOW: (24, 16)}, model=MODEL, optim=optim, total=sum_up, device=torch.device("cpu"))
        guards.begin()
        main.copy_(value_after)
        return guards, main

    whole, whole_main = guards_of(before, after, alone, shard_shape=(24, 16))
    whole.act({SLOW: before}, call=2)
    parts = []
    for index in range(2):
        local, target = (value.chunk(2, axis)[index].contiguous() for value in (before, after))
        for first, end in ((0, 192),) if index else ((0, 50), (50, 192)):
            cut = [value.reshape(-1)[first:end].clone() for value in (local, target)]
            parts.append((index, cut, {"shard_shape": tuple(local.shape), "first": first, "axis": axis, "index": index, "count": 2}))
    for _, (value, target), place in parts:
        guards, _ = guards_of(value, target, total.add_, **place)
        guards.act({SLOW: value}, call=2)
    found = []
    for _, (value, target), place in parts:
        guards, main = guards_of(value, target, lambda sums: sums.copy_(total), **place)
        guards.act({SLOW: value}, call=2)
        found.append(main)
    shards = [torch.cat(found[:2]).view(parts[0][2]["shard_shape"]), found[2].view(parts[2][2]["shard_shape"])]
    torch.testing.assert_close(torch.cat(shards, axis), whole_main, rtol=1e-6, atol=1e-6)
    assert relative(whole_main, before) == pytest.approx(0.04, rel=1e-5)


def test_a_part_that_another_rank_counts_is_limited_but_not_summed():
    before, after = torch.ones(24, 16), torch.full((24, 16), 2.0)
    main = before.clone()
    held = Held(SLOW, main, (24, 16), counted=False)
    sums = []
    other = torch.tensor([[384.0, 384.0, 0, 0, 0]], dtype=torch.float64)

    def total(values):
        sums.append(values.clone())
        values.copy_(other)

    config = OptimConfig(level_step_cap=0.5)
    guards = Guards([held], shapes={SLOW: (24, 16)}, model=MODEL, optim=config, total=total, device=torch.device("cpu"))
    main.copy_(after)
    guards.act({SLOW: before}, call=2)
    assert not sums[0].any() and torch.equal(main, torch.full((24, 16), 1.5))


def test_frozen_levels_are_bit_identical_and_others_do_not_notice():
    watched, weights = made(level_step_cap=0.01, freeze_levels=(1,))
    free, others = made(level_step_cap=0.01)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    held = [Held(name, weight, tuple(weight.shape)) for name, weight in weights.items()]
    assert {id(main) for main in frozen(held, levels=(1,))} == {id(weights[SLOW]), id(weights[NORM])}
    run(watched, weights, 6, dropped=(SLOW, NORM))
    run(free, others, 6)
    for name in SHAPES:
        assert torch.equal(weights[name], start[name] if name in (SLOW, NORM) else others[name]), name
    assert watched.guards.acted == {2: [2, 0]}


def test_a_restart_of_a_nested_level_is_capped_by_its_initial_state():
    """Period 2, restart 4: at call 4 the weights return to the initial state, a long way, and the initial state takes a capped step."""
    weight = torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(4)))
    held = [Held(SLOW, weight.data, (24, 16))]
    optim = OptimConfig(level_step_cap=0.05)
    guards = Guards(held, shapes={SLOW: (24, 16)}, model=MODEL, optim=optim, total=alone, device=torch.device("cpu"))
    nested = Nested(torch.optim.SGD([{"params": [weight], "period": 2, "restart": 4}], lr=0.5))
    clocked = Clocked(nested)
    watched = Watched(clocked, held=held, guards=guards, measures=None, origin=lambda main: nested.origin(weight))
    initial = weight.detach().clone()
    for number in range(1, 9):
        before = weight.detach().clone()
        step(watched, {SLOW: weight}, number)
        if number in (2, 6):
            assert relative(weight, before) == pytest.approx(0.05, rel=1e-5) and relative(before, initial) == 0
        if number in (4, 8):
            assert relative(weight, initial) == pytest.approx(0.05, rel=1e-5)
            initial = weight.detach().clone()
    assert guards.acted == {1: [4, 0]}


def test_the_first_step_and_no_other_sets_the_start():
    watched, weights = made(level_total_cap=0.5, lr=0.01)
    assert not watched.guards.starts
    start = weights[SLOW].detach().clone()
    run(watched, weights, 4)
    assert set(watched.guards.starts) == {SLOW, SLOWEST} and torch.equal(watched.guards.starts[SLOW], start)
    assert math.isfinite(relative(weights[SLOW], start))
