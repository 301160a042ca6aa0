"""Every derivative written by hand is the one autograd finds: backward functions, error signals of the inner loss, replay."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hope_kernels.chunk import _Ratios
from hope_kernels.memory import _Bounded, bounded, generated_target, inner_loss, l2norm, read_memory, silu_vjp, surprise
from hope_kernels.replay import replay
from hope_kernels.rule import MemoryRule
from hope_pt.testing.scans import REPEAT


def leaf(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A float64 leaf."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_silu_vjp(scale):
    grad, x = leaf(2, 7), leaf(2, 7, scale=scale, seed=1)
    (wanted,) = torch.autograd.grad(F.silu(x), x, grad, create_graph=True)
    torch.testing.assert_close(silu_vjp(grad, x), wanted, rtol=REPEAT, atol=REPEAT)
    assert torch.autograd.gradcheck(silu_vjp, (grad, x))


@pytest.mark.parametrize("delta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_bounded_error(scale, delta):
    error = leaf(3, 5, scale=scale)
    rule = MemoryRule(huber_delta=delta)
    (wanted,) = torch.autograd.grad(inner_loss(error, torch.zeros_like(error), rule).sum(), error, create_graph=True)
    torch.testing.assert_close(bounded(error, rule), wanted, rtol=1e-9, atol=REPEAT)
    assert torch.autograd.gradcheck(lambda e: _Bounded.apply(e, delta), (error,))
    assert (bounded(1e6 * error, rule).norm(dim=-1) <= delta * (1 + 1e-9)).all()


@pytest.mark.parametrize("diagonal", [0, 1])
def test_ratios(diagonal):
    a, b = leaf(2, 5), leaf(2, 5, seed=1)
    plain = (a.unsqueeze(-1) - b.unsqueeze(-2)).exp().tril(diagonal - 1)
    torch.testing.assert_close(_Ratios.apply(a, b, diagonal), plain, rtol=REPEAT, atol=0)
    assert torch.autograd.gradcheck(lambda a, b: _Ratios.apply(a, b, diagonal), (a, b))


def test_ratios_of_vanished_products_are_finite():
    """log g falls by 20 a token: products underflow, their ratios do not, and nothing above the diagonal overflows."""
    log_g = (-20.0 * torch.arange(1, 65, dtype=torch.float32)).unsqueeze(0).requires_grad_()
    out = _Ratios.apply(log_g, log_g, 1)
    out.sum().backward()
    assert out.isfinite().all() and log_g.grad.isfinite().all()
    assert (out.diagonal(dim1=-2, dim2=-1) == 1).all()


@pytest.mark.parametrize(("memory", "objective"), list(itertools.product(("mlp", "linear"), ("huber", "l2", "dot"))))
@pytest.mark.parametrize("self_target", [True, False], ids=["self", "given"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_error_signals_are_the_gradient_of_the_inner_loss(memory, objective, self_target, normalize):
    """Token by token, delta x^T is the gradient of the loss with respect to the weight; the first layer's is bounded on top of it."""
    rule = MemoryRule(memory, objective, self_target=self_target, normalize_v=normalize)
    shapes = [(5, 4), (4, 5)] if memory == "mlp" else [(4, 4)]
    weights = tuple(leaf(1, *shape, seed=i) for i, shape in enumerate(shapes))
    k, v = leaf(1, 3, 4, seed=7), leaf(1, 3, 4, seed=8)
    with torch.no_grad():
        target = generated_target(weights, v, rule)
    for token in range(3):
        loss = inner_loss(read_memory(weights, k), target, rule)[0, token]
        wanted = torch.autograd.grad(loss, weights)
        for layer, signal in enumerate(surprise(weights, k, v, rule)):
            delta = signal.delta[0, token]
            if layer == 0 and memory == "mlp" and objective == "huber":
                x = signal.x[0, token]
                exact = wanted[0][0] @ x / x.square().sum()  # the delta that the unbounded gradient has
                torch.testing.assert_close(delta, bounded(exact, rule), rtol=1e-9, atol=REPEAT)
            else:
                torch.testing.assert_close(torch.outer(delta, signal.x[0, token]), wanted[layer][0], rtol=1e-9, atol=REPEAT)


def test_layerwise_input_of_the_second_layer_is_the_normalised_hidden():
    rule = MemoryRule(dgd_scope="layerwise")
    weights, k, v = (leaf(1, 5, 4), leaf(1, 4, 5, seed=1)), leaf(1, 3, 4, seed=2), leaf(1, 3, 4, seed=3)
    signal = surprise(weights, k, v, rule)[1]
    torch.testing.assert_close(signal.x, l2norm(F.silu(k @ weights[0].mT)))
    torch.testing.assert_close(signal.wx, signal.x @ weights[1].mT)


def test_gradient_of_the_error_signals():
    """What the outer gradient sees of k, v and both weights, for the bounded self-generated target."""
    rule = MemoryRule()
    inputs = (leaf(1, 5, 4), leaf(1, 4, 5, seed=1), leaf(1, 3, 4, seed=2), leaf(1, 3, 4, seed=3))
    assert torch.autograd.gradcheck(lambda w2, w1, k, v: tuple(s.delta for s in surprise((w2, w1), k, v, rule)), inputs)


def test_replay_has_the_gradients_of_the_plain_call():
    """Also where an input needs none, an output is not used, and an input has no part in the result."""

    def function(a, b, unused):
        return a.sin() @ b, (a * a).sum(0), b.exp()

    a, b, unused = leaf(4, 3), leaf(3, 2, seed=1).detach(), leaf(2, seed=2)
    results = []
    for call in (function, lambda *inputs: replay(function, *inputs)):
        first, second, _ = call(a, b, unused)
        results.append(torch.autograd.grad(first.sum() + second.prod(), (a, unused), allow_unused=True))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is None and results[1][1] is None
    assert torch.autograd.gradcheck(lambda a, c: replay(function, a, c, unused)[:2], (a, leaf(3, 2, seed=1)))


def test_replay_without_gradients_keeps_no_graph():
    with torch.no_grad():
        (out,) = replay(lambda x: (x * 2,), leaf(3))
    assert not out.requires_grad
