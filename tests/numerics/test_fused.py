"""The hand-derived functions of `hope_kernels.fused` against finite differences, and whole scans against the general form."""

import pytest
import torch

from hope_kernels import fused
from hope_kernels.memory_scan import chunked, memory_scan
from hope_kernels.pointwise import chunked as pointwise
from hope_kernels.pointwise.chunked import conv_silu, norm_gate
from hope_kernels.projection_scan.generate import Readout, gates, gates_backward
from hope_kernels.rule import MemoryRule, MemoryState
from hope_pt.testing.scans import STACK, Size, memory_leaves, projection_leaves, random_masks, run_memory, run_projection

L, C, K, HIDDEN = 2, 5, 3, 4


def leaf(*shape: int) -> torch.Tensor:
    """A float64 leaf."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def present(tensors):
    """The tensors that are not None: what gradcheck can take."""
    return tuple(t for t in tensors if t is not None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class ByHand(torch.autograd.Function):
    """A pair of plain functions under autograd: forward(*inputs) -> (outputs, rest), backward(grads, inputs, rest) -> gradients."""

    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.inputs, ctx.backward_by_hand = [t.detach() for t in inputs], backward
        outputs, ctx.rest = forward(*ctx.inputs)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.backward_by_hand([g.clone() for g in grads], ctx.inputs, ctx.rest)


def check(forward, backward, inputs, **settings) -> bool:
    """gradcheck of a function whose backward pass is written by hand."""
    return torch.autograd.gradcheck(lambda *leaves: ByHand.apply(forward, backward, *leaves), inputs, **settings)


def test_reads():
    def unit(x):
        y = x.clone()
        scale = fused.unit_length(y)
        return y, (y, scale)

    assert check(unit, lambda grads, inputs, rest: (fused.unit_length_backward(grads[0], *rest),), (leaf(L, C, K),))

    def backward(grads, inputs, rest):
        d_z, d_weights = fused.read_backward(grads[0], inputs[0], tuple(inputs[1:]))
        return d_z, *d_weights

    assert check(lambda z, *weights: (fused.read(z, weights), None), backward, (leaf(L, C, K), leaf(L, HIDDEN, K), leaf(L, K, HIDDEN)))


@pytest.mark.parametrize("live", [None, torch.tensor([[[1.0, 0.0, 1.0, 1.0]]], dtype=torch.float64)])
@pytest.mark.parametrize(("retention", "writes"), [(True, True), (False, True), (True, False)])
def test_gates(retention, writes, live):
    def backward(grads, inputs, rest):
        readout = Readout(None, inputs[1], None, inputs[3], eta_max=0.7, retention=retention, writes=writes)
        d_rate, d_forget = gates_backward(*grads, inputs[0], inputs[2], readout, live=live)
        return d_rate, d_rate.sum((0, 2)), d_forget, d_forget.sum((0, 2))

    def forward(rate, bias_eta, forget, bias_alpha):
        readout = Readout(None, bias_eta, None, bias_alpha, eta_max=0.7, retention=retention, writes=writes)
        return gates(rate, forget, readout, live=live), None

    assert check(forward, backward, (leaf(2, 3, 4), leaf(3), leaf(2, 3, 4), leaf(3)))


@pytest.mark.parametrize("size", [6, 4, 3])
def test_terms_put_together_from_tiles(size, monkeypatch):
    """Tiles of 2 tokens: the terms of the whole chunk and their gradients."""
    x, eta = leaf(L, size, 1), torch.rand(L, size, dtype=torch.float64, requires_grad=True)
    log_alpha = (-torch.rand(L, size, dtype=torch.float64)).requires_grad_()
    wanted, _ = fused.terms_forward(x, None, eta, log_alpha, erase=True)
    monkeypatch.setattr(fused, "TILE", 2)
    found, rest = fused.written_forward(x.detach(), eta.detach(), log_alpha.detach(), erase=True)
    assert (rest[1] is not None) == (size % 2 == 0)
    for one, other in zip(found[:5], wanted[:5], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)

    def forward(*inputs):
        decays, rest = fused.written_forward(*inputs, erase=True)
        return tuple(decays[1:5]), (decays, rest)

    def backward(grads, inputs, rest):
        return fused.written_backward(fused.ChunkDecays(None, *grads, None, None), *inputs, *rest)

    assert check(forward, backward, (x, eta, log_alpha))


@pytest.mark.parametrize(("causal", "erase"), [(a, b) for a in (False, True) for b in (False, True)])
def test_terms(causal, erase):
    def function(x, eta, log_alpha, *queries):
        return present(fused.terms(x, queries[0] if causal else None, eta, log_alpha, erase=erase))

    eta = torch.rand(L, C, dtype=torch.float64, requires_grad=True)
    log_alpha = (-torch.rand(L, C, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf(L, C, K), eta, log_alpha, *([leaf(L, C, K)] if causal else [])))


FORMS = [(True, True, 1), (True, False, 1), (False, True, 1), (False, True, 2)]
"""Read inside or not, new weights or not, memories that share their tokens."""


@pytest.mark.parametrize(("causal", "writes", "memories"), FORMS)
@pytest.mark.parametrize("update", ["dgd", "gd"])
@pytest.mark.parametrize(("objective", "self_target", "normalize_v"), [("huber", True, True), ("l2", True, False), ("huber", False, True)])
def test_chunk(causal, writes, memories, update, objective, self_target, normalize_v):
    rule = MemoryRule(update=update, objective=objective, self_target=self_target, normalize_v=normalize_v, huber_delta=0.7)

    def split(k, v, w2, w1, *rest):
        queries, *rest = rest if causal else (None, *rest)
        return (k, v, queries), (w2, w1), fused.ChunkDecays(*rest, *(() if causal else (None, None)))

    def forward(*inputs):
        tokens, weights, decays = split(*inputs)
        out, ends, signals = fused.chunk_forward(*tokens, weights, decays, rule=rule, writes=writes)
        return present((out, *(ends or ()))), signals

    def backward(grads, inputs, signals):
        d_out = grads.pop(0) if causal else None
        tokens, weights, decays = split(*inputs)
        found = fused.chunk_backward(d_out, tuple(grads) or None, *tokens, weights, decays, signals, rule=rule)
        d_tokens, d_weights, d_decays = found
        everything = d_tokens[:2], d_weights, d_tokens[2:] if causal else (), d_decays if causal else d_decays[:5]
        return tuple(t for part in everything for t in part)

    decays = [leaf(L, C, 1), leaf(L, C, 1), leaf(L, 1, 1), leaf(L, C, 1), leaf(L, C, K)]
    decays += [leaf(L, C, C), leaf(L, C, C)] if causal else []
    weights = leaf(memories * L, HIDDEN, K), leaf(memories * L, K, HIDDEN)
    inputs = (leaf(L, C, K), leaf(L, C, K), *weights, *([leaf(L, C, K)] if causal else []), *decays)
    assert check(forward, backward, inputs, fast_mode=True)


@pytest.mark.parametrize("read", ["causal", "anchor"])
def test_a_long_scan_computes_again_what_a_short_one_keeps(read):
    """Beyond save_every only states are kept: the same gradients, bit for bit."""
    leaves = memory_leaves(MemoryRule(), size=Size(tokens=23))
    masks = random_masks(Size(tokens=23), 4)
    runs = [run_memory(leaves, MemoryRule(), chunk=4, backend="chunked", read=read, masks=masks, save_every=n) for n in (4, 100)]
    leaves = projection_leaves(MemoryRule())
    runs += [run_projection(leaves, MemoryRule(), stack=STACK, chunk=4, backend="chunked", save_every=n) for n in (4, 100)]
    for kept, again in (runs[:2], runs[2:]):
        for name in kept:
            assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize("length", [1, 3, 6, 18, 33])
def test_conv_silu(length, monkeypatch):
    """Up to three tiles, the last one of one or two tokens."""
    monkeypatch.setattr(pointwise, "TILE_TOKENS", 1)
    x, weight = leaf(2, length, 2, K), leaf(2, K, 4)
    assert torch.autograd.gradcheck(conv_silu, (x, weight))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 3, 0))
    wanted = torch.nn.functional.silu(sum(padded[:, tap : tap + length] * weight[..., tap] for tap in range(4)))
    torch.testing.assert_close(conv_silu(x, weight), wanted, rtol=1e-12, atol=1e-12)


def test_norm_gate():
    y, weight, gate = leaf(2, C, 2, K), leaf(2, K), leaf(2, C, 2, K)
    assert torch.autograd.gradcheck(lambda *a: norm_gate(*a, eps=1e-3), (y, weight, gate))
    wanted = torch.nn.functional.rms_norm(y, (K,), None, 1e-3) * weight * torch.nn.functional.silu(gate)
    torch.testing.assert_close(norm_gate(y, weight, gate, eps=1e-3), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", ["causal", "anchor"])
def test_scan_equals_general_form(read, monkeypatch):
    """The same scan with and without the fused functions: outputs, states and all gradients."""
    k, q, v = (torch.nn.functional.normalize(leaf(2, 3, 19, K), dim=-1).detach().requires_grad_() for _ in range(3))
    eta = torch.rand(2, 3, 19, dtype=torch.float64, requires_grad=True)
    log_alpha = (-torch.rand(2, 3, 19, dtype=torch.float64)).requires_grad_()
    start = leaf(3, HIDDEN, K), leaf(3, K, HIDDEN)
    leaves = [q, k, v, eta, log_alpha, *start]

    def results():
        state = MemoryState.start(start, batch=2, momentum=False)
        y, end = memory_scan(q, k, v, eta, log_alpha, state, rule=MemoryRule(), chunk=C, read=read, save_every=10)
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in (y, *end.tensors()))
        return [y, *end.tensors(), *torch.autograd.grad(loss, leaves)]

    fast = results()
    monkeypatch.setattr(chunked.fused, "supports", lambda rule: False)
    for one, other in zip(fast, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
