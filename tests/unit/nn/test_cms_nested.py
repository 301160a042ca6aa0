"""Nested levels against the equations written out by hand (NL eq. 72): fast weights, initial states, restarts, checkpoints.

The hand-written twin keeps both weights and two textbook optimizers of its own for each level and knows nothing of torch's state.
"""

import copy

import pytest
import torch

from hope_pt.optim import Clocked
from hope_pt.optim.nested import Nested

LR, B1, B2, EPS, WD = 0.1, 0.9, 0.95, 1e-8, 0.2
PERIODS = (1, 2, 6)
RESTARTS = (2, 6, 0)


class HandAdamW:
    """Textbook AdamW of one tensor in float64."""

    def __init__(self, like):
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, w, grad):
        self.t += 1
        self.m = B1 * self.m + (1 - B1) * grad
        self.v = B2 * self.v + (1 - B2) * grad**2
        return w * (1 - LR * WD) - LR * (self.m / (1 - B1**self.t)) / ((self.v / (1 - B2**self.t)).sqrt() + EPS)


class HandSGD:
    """w - lr g with decoupled decay."""

    def __init__(self, like):
        pass

    def __call__(self, w, grad):
        return w - LR * grad


class HandLevel:
    """One level: its own clock steps the fast weights, the next slower one the initial state, to which they return."""

    def __init__(self, value, *, period, restart, rule):
        self.w, self.phi = value.clone(), value.clone()
        self.period, self.restart = period, restart
        self.fast, self.slow = rule(value), rule(value)
        self.sum, self.all = torch.zeros_like(value), torch.zeros_like(value)

    def call(self, number, grad):
        self.sum, self.all = self.sum + grad, self.all + grad
        if self.restart and number % self.restart == 0:
            self.phi = self.slow(self.phi, self.all)
            self.w = self.phi.clone()
            self.all, self.sum = torch.zeros_like(grad), torch.zeros_like(grad)
        elif number % self.period == 0:
            self.w, self.sum = self.fast(self.w, self.sum), torch.zeros_like(grad)


def params_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in PERIODS]


def nested(params, rule=HandAdamW):
    groups = [{"params": [p], "period": n, "restart": r} for p, n, r in zip(params, PERIODS, RESTARTS, strict=True)]
    if rule is HandSGD:
        return Clocked(Nested(torch.optim.SGD(groups, lr=LR)))
    return Clocked(Nested(torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD)))


def gradients(call):
    generator = torch.Generator().manual_seed(100 + call)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in PERIODS]


def advance(optimizer, params, call, *, skip=False):
    for param, grad in zip(params, gradients(call), strict=True):
        param.grad = None if skip else grad
    optimizer.step()


@pytest.mark.parametrize("rule", [HandSGD, HandAdamW])
def test_levels_are_those_of_the_equations(rule):
    params = params_of()
    hand = [HandLevel(p.detach(), period=n, restart=r, rule=rule) for p, n, r in zip(params, PERIODS, RESTARTS, strict=True)]
    optimizer = nested(params, rule)
    for call in range(1, 22):
        advance(optimizer, params, call)
        for level, grad in zip(hand, gradients(call), strict=True):
            level.call(call, grad)
        for param, level in zip(params, hand, strict=True):
            torch.testing.assert_close(param.detach(), level.w, rtol=1e-11, atol=1e-13)
    assert not any(torch.equal(level.w, level.phi) for level in hand[:2]), "the last call is within both intervals"


def test_a_restart_forgets_the_fast_steps():
    """With gradients that cancel over the interval the initial state stays, whatever the fast weights did on the way."""
    params = params_of()
    start = params[0].detach().clone()
    optimizer = nested(params, HandSGD)
    for call, sign in ((1, 1.0), (2, -1.0)):
        for param in params:
            param.grad = sign * torch.ones_like(param)
        optimizer.step()
        if call == 1:
            assert not torch.equal(params[0], start)
    torch.testing.assert_close(params[0].detach(), start, rtol=0, atol=0)


def test_calls_without_gradients_count_and_an_interval_of_them_returns_to_the_same_state():
    params = params_of()
    optimizer = nested(params)
    for call in range(1, 7):
        advance(optimizer, params, call)
    before = [p.detach().clone() for p in params]
    advance(optimizer, params, 7, skip=True)
    advance(optimizer, params, 8, skip=True)
    assert torch.equal(params[0], before[0])
    advance(optimizer, params, 9)
    advance(optimizer, params, 10, skip=True)  # the interval of level 0 ends with the one gradient that it had
    twin = params_of()
    other = nested(twin)
    for call in range(1, 7):
        advance(other, twin, call)
    advance(other, twin, 9, skip=True)
    advance(other, twin, 9)
    torch.testing.assert_close(params[0].detach(), twin[0].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("saved_after", range(8))
def test_saving_within_an_interval_is_bit_exact(saved_after):
    params = params_of()
    optimizer = nested(params)
    for call in range(1, saved_after + 1):
        advance(optimizer, params, call)
    state = copy.deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for call in range(saved_after + 1, 15):
        advance(optimizer, params, call)
    restored = nested(copies)
    restored.load_state_dict(state)
    for call in range(saved_after + 1, 15):
        advance(restored, copies, call)
    assert all(torch.equal(param, twin) for param, twin in zip(params, copies, strict=True))


def test_state_is_the_parameters_own_and_its_copies_exist_within_an_interval_only():
    params = params_of()
    start = params[0].detach().clone()
    optimizer = nested(params)
    advance(optimizer, params, 1)
    entry = optimizer.state_dict()["state"][0]
    assert torch.equal(entry["initial"], start) and torch.equal(entry["initial_sum"], gradients(1)[0])
    assert int(entry["initial_calls"]) == 1 and "initial_state_exp_avg" not in entry
    advance(optimizer, params, 2)
    entry = optimizer.state_dict()["state"][0]
    assert not {"initial", "initial_sum", "initial_calls"} & entry.keys()
    assert {key: int(entry[key]) for key in ("step", "initial_state_step")} == {"step": 1, "initial_state_step": 1}
    assert not any(key.startswith("initial") for key in optimizer.state_dict()["state"].get(2, {}))


def test_groups_without_restart_are_the_inner_optimizers():
    params, twin = params_of(), params_of()
    groups = [[{"params": [p], "period": n} for p, n in zip(some, PERIODS, strict=True)] for some in (params, twin)]
    ours, theirs = Clocked(Nested(torch.optim.AdamW(groups[0], lr=LR))), Clocked(torch.optim.AdamW(groups[1], lr=LR))
    for call in range(1, 9):
        advance(ours, params, call)
        advance(theirs, twin, call)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_the_sum_of_an_interval_is_a_copy():
    """megatron hands out views of one gradient buffer, which it zeroes before the next step."""
    (param,) = params_of()[:1]
    start = param.detach().clone()
    optimizer = Clocked(Nested(torch.optim.SGD([{"params": [param], "period": 1, "restart": 2}], lr=LR)))
    buffer = torch.zeros_like(start)
    for value in (1.0, 3.0):
        buffer.fill_(value)
        param.grad = buffer
        optimizer.step()
        buffer.zero_()
    torch.testing.assert_close(param.detach(), start - LR * 4, rtol=1e-12, atol=0)
