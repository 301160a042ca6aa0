"""The optimizer of the deep rules: batches, scales, state and its restoration, clocks around it."""

import copy

import pytest
import torch

from hope_pt.config.optim import DeepMomentumConfig, M3Config, MomentumConfig, MuonConfig, OptimConfig
from hope_pt.optim import Clocked, DeepOptimizer, Matrices, View, make_rule
from hope_pt.optim.rules import DGD, M3, DeepMomentum, Momentum, Muon, UpdateRule

RULES = {
    "muon": Muon(MuonConfig()),
    "m3": M3(M3Config(slow_every=4)),
    "delta_momentum": Momentum(MomentumConfig(), delta=1.0),
    "deep_momentum": DeepMomentum(DeepMomentumConfig(hidden=3)),
    "dgd": DGD(),
}


def params_of(count, shape=(6, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]


def optimizer_of(params, name="m3", *, batch_bytes=1 << 20, view=None, **group):
    groups = [{"params": params, "rule": name, "lr": 0.1, **group}]
    return DeepOptimizer(groups, rules=RULES, matrices=[Matrices(view or View(0))], batch_bytes=batch_bytes)


def feed(optimizer, params, steps, *, seed=5):
    """Steps number `steps`, with gradients that depend on the number alone."""
    for number in steps:
        generator = torch.Generator().manual_seed(100 * seed + number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


class Counting(UpdateRule):
    """The gradient, with a record of the batches."""

    keys = ("seen",)
    width_exponent = 0.0
    orthogonalises = False
    exchanged = 0.0

    def flops(self, rows, columns):
        return 0.0

    def __init__(self):
        self.batches = []

    def update(self, grads, state, step):
        self.batches.append((len(grads), step.number, step.lr, grads.data_ptr(), state["seen"].data_ptr()))
        state["seen"].add_(grads)
        return -grads


@pytest.mark.parametrize("name", list(RULES))
def test_batches_of_any_size_give_the_same(name):
    runs = []
    for batch_bytes in (1, 2 * 6 * 4 * 4, 1 << 20):
        params = params_of(5)
        feed(optimizer_of(params, name, batch_bytes=batch_bytes, weight_decay=0.1), params, range(6))
        runs.append(torch.stack([param.detach() for param in params]))
    # Batched products of another size round differently.
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-4, atol=1e-5)


def test_batches_are_bounded_and_one_parameter_is_not_copied():
    rule, params = Counting(), params_of(5)
    matrices = [Matrices(View(0))]
    optimizer = DeepOptimizer([{"params": params, "rule": "it", "lr": 1.0}], rules={"it": rule}, matrices=matrices, batch_bytes=2 * 96)
    feed(optimizer, params, range(1))
    assert [size for size, *_ in rule.batches] == [2, 2, 1]
    assert rule.batches[-1][3:] == (params[4].grad.data_ptr(), optimizer.state[params[4]]["seen"].data_ptr())
    for param in params:
        assert torch.equal(optimizer.state[param]["seen"], param.grad)


def test_learning_rate_and_decay_are_those_of_the_group():
    rule, (param,) = Counting(), params_of(1)
    group = {"params": [param], "rule": "it", "lr": 0.5, "lr_scale": 0.2, "weight_decay": 0.3}
    optimizer = DeepOptimizer([group], rules={"it": rule}, matrices=[Matrices(View(0))])
    before, param.grad = param.detach().clone(), torch.ones(6, 4)
    optimizer.step()
    assert rule.batches[0][1:3] == (1, pytest.approx(0.1))
    torch.testing.assert_close(param.detach(), before * (1 - 0.1 * 0.3) - 0.1)


def test_parameters_without_a_gradient_stay_and_do_not_count():
    rule, params = Counting(), params_of(2)
    optimizer = DeepOptimizer([{"params": params, "rule": "it", "lr": 1.0}], rules={"it": rule}, matrices=[Matrices(View(0))])
    before = params[1].detach().clone()
    feed(optimizer, params[:1], range(3))
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    feed(optimizer, params, range(3, 4))
    assert sorted(batch[:2] for batch in rule.batches[-2:]) == [(1, 1), (1, 4)]
    assert [int(optimizer.state[param]["step"]) for param in params] == [4, 1]


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_state_dict_round_trip_within_an_interval(name, at):
    """Saved after `at` updates, between two of the slow momentum's or at one, and loaded into a new optimizer."""
    params = params_of(3)
    optimizer = optimizer_of(params, name, weight_decay=0.1)
    feed(optimizer, params, range(at))
    if name == "dgd":
        optimizer.state_of(params[0], group=0)["gram"].add_(torch.eye(4))
    others = copy.deepcopy(params)
    again = optimizer_of(others, name, weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed(optimizer, params, range(at, at + 5))
    feed(again, others, range(at, at + 5))
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)


def test_state_has_the_parameters_shape_or_its_own():
    params = params_of(2, (12, 5))
    streams = View(0, (2, 2, 2))
    optimizer = optimizer_of(params, "deep_momentum", view=streams)
    feed(optimizer, params, range(1))
    state = optimizer.state[params[0]]
    assert optimizer.own_shapes(0) == {"w1": (3, 4, 3), "w2": (3, 3, 5)}
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (), "linear": (12, 5), "second": (12, 5), "w1": (3, 4, 3), "w2": (3, 3, 5)
    }  # fmt: skip
    heads = optimizer_of(params_of(1, (3, 2, 5, 4)), "deep_momentum")
    assert heads.own_shapes(0) == {"w1": (3, 2, 5, 3), "w2": (3, 2, 3, 4)}
    assert optimizer_of(params_of(1), "m3").own_shapes(0) == {}
    assert optimizer_of(params_of(1), "dgd").own_shapes(0) == {"gram": (4, 4)}


def test_state_and_update_of_bf16_parameters_are_fp32():
    param = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    optimizer = optimizer_of([param], "m3")
    param.grad = torch.randn(6, 4).bfloat16()
    optimizer.step()
    assert optimizer.state[param]["fast"].dtype == torch.float32 and param.dtype == torch.bfloat16


def test_a_clock_around_it_sums_gradients():
    """A group of period 3 takes the update of the summed gradients; M3's interval counts its own updates."""
    slow, plain = params_of(2), params_of(2)
    clocked = Clocked(optimizer_of(slow, "m3", period=3))
    alone = optimizer_of(plain, "m3")
    for interval in range(5):
        grads = [[torch.randn(6, 4, generator=torch.Generator().manual_seed(9 * interval + 3 * n + k)) for k in range(3)] for n in range(2)]
        for k in range(3):
            for param, own in zip(slow, grads, strict=True):
                param.grad = own[k].clone()
            clocked.step()
        for param, own in zip(plain, grads, strict=True):
            param.grad = own[0] + own[1] + own[2]
        alone.step()
    for param, other in zip(slow, plain, strict=True):
        assert torch.equal(param, other)


def test_rules_are_made_from_the_configuration():
    optim = OptimConfig(momentum=MomentumConfig(delta=0.5))
    names = ("muon", "m3", "momentum", "delta_momentum", "deep_momentum", "dgd")
    made = {name: make_rule(name, optim=optim) for name in names}
    assert [type(rule) for rule in made.values()] == [Muon, M3, Momentum, Momentum, DeepMomentum, DGD]
    assert (made["momentum"].delta, made["delta_momentum"].delta) == (0.0, 0.5)
    with pytest.raises(KeyError):
        make_rule("adamw", optim=optim)


def test_m3_keeps_only_the_state_that_it_needs():
    assert M3(M3Config(slow_weight=0.0, second_moment=False)).keys == ("fast",)
    assert M3(M3Config()).keys == ("fast", "second", "slow", "slow_sum", "slow_direction")
