"""The rules of the outer optimizer: batched against the equation of one matrix, and against what they must equal in special cases.

Everything is float64, so that a difference is a mistake and not a rounding; where torch's Muon is the oracle its bf16 is taken out.
"""

import math

import pytest
import torch

from hope_pt.config.optim import DeepMomentumConfig, M3Config, MomentumConfig, MuonConfig
from hope_pt.optim import DeepOptimizer, Matrices, View
from hope_pt.optim.inputs import normalised_gram
from hope_pt.optim.rules import DGD, M3, DeepMomentum, Momentum, Muon, NewtonSchulz, deep_momentum, dgd, m3, momentum, muon

SAME = 1e-12
"""Two forms in float64 after ten updates, relative to the largest value: 5e-14 as measured, through Newton-Schulz too."""
NS = NewtonSchulz()
VIEWS = {
    "matrix": (View(0), (10, 6)),
    "wide": (View(0), (4, 9)),
    "row": (View(0), (1, 7)),
    "column": (View(1), (7, 1)),
    "memories": (View(0), (3, 5, 4)),
    "stacked memories": (View(0), (2, 3, 4, 6)),
    "streams": (View(0, (3, 3, 3, 3)), (24, 6)),
    "streams with a logit": (View(0, (3, 3, 3, 3, 1)), (26, 6)),
}


def rule_cases():
    """(id, batched rule, reference of one matrix with keyword arguments)."""
    for config in (MuonConfig(), MuonConfig(scale="spectral", nesterov=False)):
        yield f"muon-{config.scale}", Muon(config), lambda g, s, number, c=config: _of_muon(g, s, c)
    for settings in (
        {},
        {"mode": "literal"},
        {"mode": "literal", "second_moment": False},
        {"second_moment": False},
        {"slow_weight": 0.0},
        {"slow_weight": 0.0, "second_moment": False, "nesterov": False},
    ):
        config = M3Config(slow_every=3, **settings)
        name = "-".join(f"{key}={value}" for key, value in settings.items())
        yield f"m3-{name}", M3(config), lambda g, s, number, c=config: m3.reference(g, s, number=number, config=c, orthogonalise=NS)
    for p in ("none", "adam", "newton_schulz"):
        for delta, side in ((0.0, "right"), (0.7, "right"), (1.0, "left")):
            config = MomentumConfig(preconditioner=p, side=side, decay=0.8)
            yield (
                f"momentum-{p}-{delta}-{side}",
                Momentum(config, delta=delta),
                lambda g, s, number, c=config, d=delta: momentum.reference(g, s, number=number, config=c, delta=d, orthogonalise=NS),
            )
    for settings in ({}, {"hidden": 0}, {"output": "newton_schulz"}, {"preconditioner": "none", "inner_lr": 3.0, "hidden": 5}):
        config = DeepMomentumConfig(decay=0.7, **settings)
        name = "-".join(f"{key}={value}" for key, value in settings.items())
        yield (
            f"deep-{name}",
            DeepMomentum(config),
            lambda g, s, number, c=config: deep_momentum.reference(g, s, number=number, config=c, orthogonalise=NS),
        )


def _of_muon(grad, state, config):
    direction, new = muon.reference(grad, state["momentum"], config=config, orthogonalise=NS)
    return direction, {"momentum": new}


class References:
    """Ten updates of every matrix by itself with a reference."""

    def __init__(self, reference, rows, columns, hidden):
        names = ("momentum", "fast", "second", "slow", "slow_sum", "slow_direction", "linear")
        self.state = {name: torch.zeros(rows, columns, dtype=torch.float64) for name in names}
        self.state["w1"], self.state["w2"] = torch.zeros(rows, hidden).double(), torch.zeros(hidden, columns).double()
        self.reference, self.number = reference, 0

    def direction(self, grad):
        self.number += 1
        direction, new = self.reference(grad, self.state, number=self.number)
        self.state.update(new)
        return direction


def pieces(x, view):
    """The matrices of one parameter, cut out by hand: rows of a head are q, k, v, ... in turn."""
    if not view.streams:
        return list(x.reshape(-1, *x.shape[-2:]))
    found, per_head = [], sum(view.streams)
    for index, rows in enumerate(view.streams):
        first = sum(view.streams[:index])
        found.append(torch.cat([x[head + first : head + first + rows] for head in range(0, len(x), per_head)]))
    return found


def gradients(shape, steps, seed):
    """Gradients with a common part, so that momenta build up, and entries of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -2, shape[-1], dtype=torch.float64)
    return [(common + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)) * sizes for _ in range(steps)]


def optimizer_of(params, rule, view=None, **group):
    groups = [{"params": params, "rule": "it", **group}]
    return DeepOptimizer(groups, rules={"it": rule}, matrices=[Matrices(view or View(0))])


def gap(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("case", list(rule_cases()), ids=lambda case: case[0])
@pytest.mark.parametrize("shape", list(VIEWS))
def test_batched_is_the_equation_of_every_matrix(case, shape):
    """Three parameters in one stack, ten updates, with weight decay: parameters equal to each matrix treated by itself."""
    (_, rule, reference), (view, size) = case, VIEWS[shape]
    params = [torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(n)).double()) for n in range(3)]
    hidden = rule.config.hidden if isinstance(rule, DeepMomentum) else 0
    wanted = [[x.detach().clone() for x in pieces(param, view)] for param in params]
    oracles = [[References(reference, *x.shape, hidden) for x in matrices] for matrices in wanted]
    optimizer = optimizer_of(params, rule, view, lr=0.1, lr_scale=0.5, weight_decay=0.3)
    series = [gradients(size, 10, seed) for seed in range(3)]
    for number in range(10):
        for param, grads, matrices, own in zip(params, series, wanted, oracles, strict=True):
            param.grad = grads[number].clone()
            for index, (grad, oracle) in enumerate(zip(pieces(param.grad, view), own, strict=True)):
                matrices[index] = matrices[index] * (1 - 0.05 * 0.3) + 0.05 * oracle.direction(grad)
        optimizer.step()
    for param, matrices in zip(params, wanted, strict=True):
        for got, matrix in zip(pieces(param.detach(), view), matrices, strict=True):
            assert gap(got, matrix) < SAME


@pytest.fixture
def wide_muon(monkeypatch):
    """torch.optim.Muon computes its Newton-Schulz in bf16; here in the dtype of the gradient."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


def run_both(ours, theirs, *, size, steps=10):
    mine = torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(3)).double())
    other = torch.nn.Parameter(mine.detach().clone())
    first, second = ours(mine), theirs(other)
    for grad in gradients(size, steps, 7):
        mine.grad, other.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    return mine.detach(), other.detach()


@pytest.mark.parametrize("size", [(12, 5), (5, 12), (8, 8), (1, 6)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_muon_is_torch_muon(size, nesterov, scale, theirs, wide_muon):
    rule = Muon(MuonConfig(scale=scale, nesterov=nesterov, momentum=0.9))
    got, wanted = run_both(
        lambda param: optimizer_of([param], rule, lr=0.02, weight_decay=0.1),
        lambda param: torch.optim.Muon(
            [param], lr=0.02, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs, ns_coefficients=NS.coefficients
        ),
        size=size,
    )
    assert gap(got, wanted) < SAME


@pytest.mark.parametrize("size", [(12, 5), (5, 12), (8, 8)])
def test_m3_without_slow_momentum_and_second_moment_is_torch_muon(size, wide_muon):
    rule = M3(M3Config(slow_weight=0.0, second_moment=False))
    got, wanted = run_both(
        lambda param: optimizer_of([param], rule, lr=0.02, weight_decay=0.1),
        lambda param: torch.optim.Muon([param], lr=0.02, adjust_lr_fn="match_rms_adamw", ns_coefficients=NS.coefficients),
        size=size,
    )
    assert gap(got, wanted) < SAME


def test_muon_is_torch_muon_in_bf16_with_its_coefficients():
    """As it runs: both compute in bf16, in another order of rounding. Each update is known to some per cent."""
    muon_ns = NewtonSchulz(coefficients=(3.4445, -4.7750, 2.0315), dtype=torch.bfloat16)
    start = torch.randn((64, 48), generator=torch.Generator().manual_seed(3)).double()
    got, wanted = run_both(
        lambda param: optimizer_of([param], Muon(MuonConfig(), orthogonalise=muon_ns), lr=0.02),
        lambda param: torch.optim.Muon([param], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        size=(64, 48),
    )
    assert 0 < ((got - wanted).norm() / (wanted - start).norm()).item() < 0.03


def test_m3_slow_momentum_is_used_from_the_step_after(monkeypatch):
    """slow_every = 2: updates 1 and 2 are those without a slow part, update 3 is not; M2 has then had the sum of two gradients."""
    config = M3Config(slow_every=2, second_moment=False, mode="literal")
    grads = gradients((6, 4), 3, 1)
    slow, plain = M3(config), M3(config.model_copy(update={"slow_weight": 0.0}))
    params = [torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)) for _ in range(2)]
    optimizers = [optimizer_of([param], rule, lr=1.0) for param, rule in zip(params, (slow, plain), strict=True)]
    for number, grad in enumerate(grads, 1):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        assert torch.equal(*params) == (number < 3)
    torch.testing.assert_close(params[0] - params[1], -config.slow_weight * NS(config.betas[2] * (grads[0] + grads[1])))


@pytest.mark.parametrize("slow_weight", [0.0, 0.5])
@pytest.mark.parametrize("shape", ["matrix", "memories", "streams with a logit"])
def test_m3_divides_by_the_second_moment_without_a_change_of_size(slow_weight, shape):
    """Every matrix of every update moves by another matrix of the same norm; gradients of another size give the same update."""
    view, size = VIEWS[shape]
    runs = []
    for factor, second in ((1.0, True), (1e-6, True), (1.0, False)):
        param = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        config = M3Config(slow_every=2, eps=1e-30, slow_weight=slow_weight, second_moment=second)
        optimizer = optimizer_of([param], M3(config), view, lr=1e-3)
        runs.append([])
        for grad in gradients(size, 5, 2):
            before = param.detach().clone()
            param.grad = grad * factor
            optimizer.step()
            runs[-1] += pieces(param.detach() - before, view)
    for divided, scaled, plain in zip(*runs, strict=True):
        assert gap(scaled, divided) < SAME
        assert abs(divided.norm() - plain.norm()) < SAME and gap(divided, plain) > 1e-2


def test_m3_moves_as_much_as_adamw_where_gradients_have_full_rank():
    """The root mean square of an update is 0.2 lr, within the range of Newton-Schulz's singular values."""
    param = torch.nn.Parameter(torch.zeros(40, 24, dtype=torch.float64))
    param.grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).double()
    optimizer_of([param], M3(M3Config(slow_weight=0.0)), lr=1e-3).step()
    assert 0.7 < param.detach().square().mean().sqrt().item() / 0.2e-3 < 1.2


@pytest.mark.parametrize("name", ["momentum", "delta_momentum", "deep_momentum"])
def test_without_their_terms_they_are_sgd_with_momentum(name):
    a, lr = 0.9, 0.3
    rule = {
        "momentum": Momentum(MomentumConfig(decay=a, preconditioner="none"), delta=0.0),
        "delta_momentum": Momentum(MomentumConfig(decay=a, preconditioner="none", side="left"), delta=0.0),
        "deep_momentum": DeepMomentum(DeepMomentumConfig(decay=a, preconditioner="none", hidden=0)),
    }[name]
    got, wanted = run_both(
        lambda param: optimizer_of([param], rule, lr=lr), lambda param: torch.optim.SGD([param], lr=lr * (1 - a), momentum=a), size=(5, 4)
    )
    assert gap(got, wanted) < SAME


def test_linear_deep_momentum_is_preconditioned_momentum():
    got, wanted = run_both(
        lambda param: optimizer_of([param], DeepMomentum(DeepMomentumConfig(hidden=0)), lr=0.1),
        lambda param: optimizer_of([param], Momentum(MomentumConfig(), delta=0.0), lr=0.1),
        size=(5, 4),
    )
    assert gap(got, wanted) < SAME


def test_adam_preconditioned_momentum_without_decay_is_adam():
    rule = Momentum(MomentumConfig(decay=0.0, beta2=0.7), delta=0.0)
    got, wanted = run_both(
        lambda param: optimizer_of([param], rule, lr=0.1, weight_decay=0.1),
        lambda param: torch.optim.AdamW([param], lr=0.1, betas=(0.0, 0.7), weight_decay=0.1),
        size=(5, 4),
    )
    assert gap(got, wanted) < SAME


@pytest.mark.parametrize("side", ["right", "left"])
def test_delta_momentum_is_gradient_descent_on_its_regression(side):
    """The delta term and the written value are autograd's gradient of |m g^T + P|^2 / 2 (or of its mirror image), P g the gradient."""
    a, size = 0.9, (5, 4)
    rule = Momentum(MomentumConfig(decay=a, preconditioner="none", side=side), delta=1.0)
    param = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = optimizer_of([param], rule, lr=1.0)
    m = torch.zeros(size, dtype=torch.float64)
    for grad in gradients(size, 4, 5):
        param.grad = grad.clone()
        optimizer.step()
        key = grad / grad.norm()
        free = m.clone().requires_grad_()
        answer = free @ key.mT if side == "right" else key.mT @ free
        (slope,) = torch.autograd.grad(0.5 * answer.square().sum(), free)
        m = a * m - slope - (1 - a) * grad
        assert gap(optimizer.state[param]["momentum"], m) < SAME


def test_deep_momentum_learns_by_the_gradient_of_its_objective():
    """The hidden layer's steps are autograd's gradients of sum_i <m(key_i), e_i>, the mean over the rows for the shared W2."""
    config = DeepMomentumConfig(hidden=3, decay=0.6, inner_lr=0.8, preconditioner="none")
    rows, columns = 5, 4
    start = deep_momentum.start(config, columns)
    w1, w2 = torch.zeros(rows, 3).double(), start.clone()
    param = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    optimizer = optimizer_of([param], DeepMomentum(config), lr=1.0)
    linear = torch.zeros(rows, columns).double()
    for grad in gradients((rows, columns), 5, 6):
        before = param.detach().clone()
        param.grad = grad.clone()
        optimizer.step()
        length = grad.norm(dim=1, keepdim=True)
        first, second = w1.clone().requires_grad_(), w2.clone().requires_grad_()
        answers = first @ torch.tanh(second @ (grad / length).T)
        slopes = torch.autograd.grad(answers.diagonal().sum(), (first, second))
        w1 = 0.6 * w1 - 0.4 * 0.8 * slopes[0]
        w2 = start + 0.6 * (w2 - start) - 0.4 * 0.8 * slopes[1] / rows
        linear = 0.6 * linear - 0.4 * grad
        wanted = linear + length * (w1 @ torch.tanh(w2 @ torch.eye(columns).double())) / math.sqrt(3 * columns)
        assert gap(param.detach() - before, wanted) < SAME


def test_deep_momentum_stays_within_its_bounds():
    """The same huge gradient for a long time: W1 within inner_lr, W2 within inner_lr^2 of its start, the update of the gradient's size."""
    config = DeepMomentumConfig(inner_lr=2.0, decay=0.9)
    param = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    optimizer = optimizer_of([param], DeepMomentum(config), lr=1.0)
    grad = 1e6 * torch.ones(6, 8, dtype=torch.float64)
    for _ in range(300):
        before = param.detach().clone()
        param.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[param]
    assert state["w1"].abs().max() <= 2.0 and state["w2"].norm(dim=-1).max() <= 4.0
    assert (param.detach() - before).abs().max() <= 1.0 + 2.0 * math.sqrt(config.hidden)


def test_dgd_is_the_closed_form_of_one_token():
    """The minimum of the proximal problem of App. C, from autograd's gradient through a linear layer and a solve."""
    generator = torch.Generator().manual_seed(1)
    weight, target = torch.randn(5, 4, generator=generator).double(), torch.randn(5, generator=generator).double()
    x = torch.nn.functional.normalize(torch.randn(4, generator=generator).double(), dim=0)
    param = torch.nn.Parameter(weight.clone())
    (0.5 * (param @ x - target).square().sum()).backward()
    assert param.grad is not None
    lr = 0.7
    # W (I + lr x x^T) = W_t - lr grad_y L x^T
    wanted = torch.linalg.solve(torch.eye(4).double() + lr * torch.outer(x, x), (weight - lr * torch.outer(weight @ x - target, x)).T).T
    printed = weight @ (torch.eye(4) - lr / (1 + lr) * torch.outer(x, x)) - lr / (1 + lr) * torch.outer(weight @ x - target, x)
    optimizer = optimizer_of([param], DGD(), lr=lr)
    optimizer.state_of(param, group=0)["gram"].add_(torch.outer(x, x))
    optimizer.step()
    assert gap(wanted, printed) < SAME
    assert gap(param.detach(), wanted) < SAME


def test_dgd_of_a_batch_is_the_mean_of_its_tokens():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.nn.functional.normalize(torch.randn(7, 4, generator=generator).double(), dim=1)
    deltas, weight = torch.randn(7, 5, generator=generator).double(), torch.randn(5, 4, generator=generator).double()
    singles = [dgd.reference(torch.outer(d, x), weight, x.unsqueeze(0), lr=0.4) for d, x in zip(deltas, inputs, strict=True)]
    param = torch.nn.Parameter(weight.clone())
    param.grad = deltas.T @ inputs / 7
    optimizer = optimizer_of([param], DGD(), lr=0.4)
    optimizer.state_of(param, group=0)["gram"].add_(normalised_gram(3.0 * inputs))
    optimizer.step()
    assert gap(param.detach(), torch.stack(singles).mean(0)) < SAME
    assert not optimizer.state[param]["gram"].any()


def test_dgd_without_inputs_is_gradient_descent():
    param = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    param.grad = torch.full((3, 2), 0.5, dtype=torch.float64)
    optimizer_of([param], DGD(), lr=1.0).step()
    assert torch.equal(param.detach(), torch.full((3, 2), 0.75, dtype=torch.float64))


@pytest.mark.parametrize("case", list(rule_cases()), ids=lambda case: case[0])
def test_a_zero_gradient_moves_nothing(case):
    param = torch.nn.Parameter(torch.ones(3, 4))
    param.grad = torch.zeros(3, 4)
    optimizer_of([param], case[1], lr=1.0).step()
    assert torch.equal(param.detach(), torch.ones(3, 4))
