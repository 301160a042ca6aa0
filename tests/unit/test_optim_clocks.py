"""The stream clock against a reference written out by hand, with AdamW's formula instead of torch's class."""

import copy

import pytest
import torch

from hope_pt.errors import CheckpointError
from hope_pt.optim import Clocked

LR, B1, B2, EPS, WD = 0.1, 0.9, 0.95, 1e-8, 0.2


class HandAdamW:
    """Textbook AdamW of one tensor in float64."""

    def __init__(self, value):
        self.p, self.m, self.v, self.t = value.clone(), torch.zeros_like(value), torch.zeros_like(value), 0

    def update(self, grad):
        self.t += 1
        self.p *= 1 - LR * WD
        self.m = B1 * self.m + (1 - B1) * grad
        self.v = B2 * self.v + (1 - B2) * grad**2
        m_hat, v_hat = self.m / (1 - B1**self.t), self.v / (1 - B2**self.t)
        self.p -= LR * m_hat / (v_hat.sqrt() + EPS)


def _clocked(periods, params):
    groups = [{"params": [param], "period": period} for param, period in zip(params, periods, strict=True)]
    return Clocked(torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD))


def _params(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64)) for _ in range(count)]


def _grads(step, count):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(count)]


def _advance(optimizer, params, step, *, skip=False):
    for param, grad in zip(params, _grads(step, len(params)), strict=True):
        param.grad = None if skip else grad
    optimizer.step()


def test_each_group_steps_every_period_with_the_sum_of_its_gradients():
    periods = (1, 2, 3)
    params = _params(3)
    references = [HandAdamW(param.detach()) for param in params]
    sums = [torch.zeros(5, dtype=torch.float64) for _ in params]
    optimizer = _clocked(periods, params)
    for step in range(1, 8):
        before = [param.detach().clone() for param in params]
        _advance(optimizer, params, step)
        for i, (period, grad) in enumerate(zip(periods, _grads(step, 3), strict=True)):
            sums[i] += grad
            if step % period == 0:
                references[i].update(sums[i])
                sums[i] = torch.zeros(5, dtype=torch.float64)
            else:
                assert torch.equal(params[i], before[i]), "a level moved within its interval"
            torch.testing.assert_close(params[i].detach(), references[i].p, rtol=1e-12, atol=0)


def test_a_call_without_gradients_advances_the_clock_and_contributes_nothing():
    params = _params(2)
    fast, slow = HandAdamW(params[0].detach()), HandAdamW(params[1].detach())
    optimizer = _clocked((1, 2), params)
    _advance(optimizer, params, 1)
    _advance(optimizer, params, 2, skip=True)
    fast.update(_grads(1, 2)[0])
    slow.update(_grads(1, 2)[1])
    torch.testing.assert_close(params[0].detach(), fast.p, rtol=1e-12, atol=0)
    torch.testing.assert_close(params[1].detach(), slow.p, rtol=1e-12, atol=0)


def test_an_interval_without_gradients_changes_nothing():
    params = _params(1)
    start = params[0].detach().clone()
    optimizer = _clocked((2,), params)
    for step in (1, 2):
        _advance(optimizer, params, step, skip=True)
    assert torch.equal(params[0], start)


@pytest.mark.parametrize("saved_after", range(7))
def test_saving_within_an_interval_is_bit_exact(saved_after):
    params = _params(3)
    optimizer = _clocked((1, 2, 3), params)
    for step in range(1, saved_after + 1):
        _advance(optimizer, params, step)
    state = copy.deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for step in range(saved_after + 1, 9):
        _advance(optimizer, params, step)
    restored = _clocked((1, 2, 3), copies)
    restored.load_state_dict(state)
    for step in range(saved_after + 1, 9):
        _advance(restored, copies, step)
    for param, twin in zip(params, copies, strict=True):
        assert torch.equal(param, twin)
    assert restored.num_calls == 8


def test_accumulated_gradients_are_in_the_state_dict_only_while_an_interval_is_open():
    params = _params(2)
    optimizer = _clocked((1, 2), params)
    _advance(optimizer, params, 1)
    assert torch.equal(optimizer.state_dict()["state"][1]["accumulated"], _grads(1, 2)[1])
    _advance(optimizer, params, 2)
    assert "accumulated" not in optimizer.state_dict()["state"][1]


def test_the_accumulator_is_a_copy():
    """megatron hands out views of one gradient buffer, which it zeroes before the next step."""
    params = _params(1)
    optimizer = _clocked((2,), params)
    params[0].grad = buffer = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    buffer.zero_()
    assert optimizer.state_dict()["state"][0]["accumulated"].tolist() == [1.0] * 5


def test_a_period_cannot_change_within_an_open_interval():
    params = _params(1)
    optimizer = _clocked((3,), params)
    _advance(optimizer, params, 1)
    with pytest.raises(CheckpointError, match="interval of 3 steps"):
        _clocked((2,), _params(1)).load_state_dict(optimizer.state_dict())


def _two_inner(periods, params):
    """AdamW of the first and last parameters, SGD with momentum of the middle one, under one clock."""
    groups = [{"params": [param], "period": period} for param, period in zip(params, periods, strict=True)]
    return Clocked(torch.optim.AdamW([groups[0], groups[2]], lr=LR), torch.optim.SGD([groups[1]], lr=LR, momentum=0.9))


@pytest.mark.parametrize("saved_after", range(4))
def test_several_inner_optimizers_share_one_clock_and_one_state(saved_after):
    params = _params(3)
    alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer, sgd = _two_inner((1, 2, 3), params), Clocked(torch.optim.SGD([{"params": [alone[1]], "period": 2}], lr=LR, momentum=0.9))
    for step in range(1, saved_after + 1):
        _advance(optimizer, params, step)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][-1]["params"] == [2], "parameters are counted over all inner optimizers"
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    restored = _two_inner((1, 2, 3), copies)
    restored.load_state_dict(state)
    for step in range(saved_after + 1, 9):
        _advance(optimizer, params, step)
        _advance(restored, copies, step)
    for step in range(1, 9):
        alone[1].grad = _grads(step, 3)[1]
        sgd.step()
    assert all(torch.equal(param, twin) for param, twin in zip(params, copies, strict=True))
    assert torch.equal(params[1], alone[1])
