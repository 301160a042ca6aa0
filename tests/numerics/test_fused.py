"""The hand-derived functions of `hope_kernels.fused` against finite differences, and whole scans against the general form."""

import pytest
import torch

from hope_kernels import fused
from hope_kernels.memory_scan import chunked, memory_scan
from hope_kernels.pointwise.chunked import conv_silu, norm_gate
from hope_kernels.rule import MemoryRule, MemoryState

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


def test_reads():
    weights = leaf(L, HIDDEN, K), leaf(L, K, HIDDEN)
    assert torch.autograd.gradcheck(fused.unit_length, (leaf(L, C, K),))
    assert torch.autograd.gradcheck(fused.read, (leaf(L, C, K), *weights))
    assert torch.autograd.gradcheck(fused.readout, (leaf(L, C, K), *weights, leaf(L, K, 1)))


@pytest.mark.parametrize(("causal", "erase"), [(a, b) for a in (False, True) for b in (False, True)])
def test_terms(causal, erase):
    def function(x, eta, log_alpha, *queries):
        return present(fused.terms(x, queries[0] if causal else None, eta, log_alpha, erase=erase))

    eta = torch.rand(L, C, dtype=torch.float64, requires_grad=True)
    log_alpha = (-torch.rand(L, C, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf(L, C, K), eta, log_alpha, *([leaf(L, C, K)] if causal else [])))


FORMS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize(("causal", "writes"), FORMS)
@pytest.mark.parametrize("update", ["dgd", "gd"])
@pytest.mark.parametrize(("objective", "self_target", "normalize_v"), [("huber", True, True), ("l2", True, False), ("huber", False, True)])
def test_chunk(causal, writes, update, objective, self_target, normalize_v):
    rule = MemoryRule(update=update, objective=objective, self_target=self_target, normalize_v=normalize_v, huber_delta=0.7)

    def function(k, v, w2, w1, queries, *decays):
        decays = fused.ChunkDecays(*decays, *(() if causal else (None, None)))
        out, ends = fused.chunk(k, v, (w2, w1), decays, rule=rule, queries=queries if causal else None, writes=writes)
        return present((out, *ends)) if writes else out

    decays = [leaf(L, C, 1), leaf(L, C, 1), leaf(L, 1, 1), leaf(L, C, 1), leaf(L, C, K)]
    decays += [leaf(L, C, C), leaf(L, C, C)] if causal else []
    queries = leaf(L, C, K) if causal else torch.zeros(1)
    assert torch.autograd.gradcheck(
        function, (leaf(L, C, K), leaf(L, C, K), leaf(L, HIDDEN, K), leaf(L, K, HIDDEN), queries, *decays), fast_mode=True
    )


@pytest.mark.parametrize("length", [1, 3, 6])
def test_conv_silu(length):
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
