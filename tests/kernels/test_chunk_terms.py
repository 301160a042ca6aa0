"""Terms of a tile and the inverse: the kernels and their plain torch twins against the token recurrence in float64."""

import pytest
import torch

from hope_kernels import fused
from hope_kernels.chunk_terms import chunk_inverse, reference, unit_lower_inverse
from hope_kernels.chunk_terms.tiles import join_tiles, split_tiles
from hope_kernels.tiling import Tiling
from hope_pt.testing.scans import REPEAT, SCAN, Size, gates, mismatches, random_like_keys

FP32 = 1e-5
"""2^-24 times the roundings of a tile of 64; 1e-6 as measured."""
BF16 = 5e-3
"""Terms rounded once to bf16, 2^-9 = 2e-3, from exact Gram matrices."""
BF16_GRADIENT = 1.5e-2
"""Gradients of products whose operands are rounded to bf16, Y and M twice."""
INVERSE = 1e-6
"""The inverse in fp32: substitution and merges add a few roundings; Neumann's series would be at 1e1 for correlated keys."""

ENDS = ("g_end", "kappa_end", "mu_total")
"""Terms of tiles, not of tokens."""

TILINGS = {
    "one tile": Tiling(16, 16, 16),
    "one token": Tiling(1, 64, 16),
    "shorter than a tile": Tiling(11, 64, 64),
    "chunks of several tiles": Tiling(50, 40, 16),
    "last chunk of fewer tiles": Tiling(70, 64, 32),
    "tile of 64": Tiling(100, 64, 64),
}


def leaves(tiling, *, rows=2, width=24, keys="random", retention="mixed", eta_max=1.0, seed=0):
    """k, q [L, T, K], eta, log_alpha [L, T] in float64."""
    size = Size(rows, 1, tiling.tokens, width)
    generator = torch.Generator().manual_seed(seed)
    k = random_like_keys(keys, size, generator, torch.float64)[:, 0].contiguous()
    q = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    eta, log_alpha = (t[:, 0].contiguous() for t in gates(retention, eta_max, size, generator, torch.float64))
    return {"k": k, "q": q, "eta": eta, "log_alpha": log_alpha}


def recurrence(inputs, tiling, *, queries, erase):
    """(terms and inverse by name, laid out by token as the kernels do) by the token recurrence of every tile."""
    x, q, eta, log_alpha = (split_tiles(inputs[name], tiling) for name in ("k", "q", "eta", "log_alpha"))
    terms, inverse = reference.terms(x, q if queries else None, eta, log_alpha, erase=erase)
    found = {name: join_tiles(getattr(terms, name).squeeze(-1), tiling) for name in ("g", "g_prev", "w")}
    found |= {"g_end": terms.g_end.flatten(1), "y": join_tiles(terms.y, tiling)}
    found |= {name: join_tiles(getattr(terms, name), tiling) for name in ("m", "n") if queries}
    return found | ({"inverse": join_tiles(inverse, tiling)} if erase else {})


def with_cotangents(found, seed=1):
    """A fixed random gradient of every term that has one (the inverse is not an output of the op)."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in found if name != "inverse"]
    cotangents = {name: torch.randn(found[name].shape, generator=generator, dtype=torch.float64) for name in names}
    for name in ("m", "n"):  # what belongs to places without a token is no one's
        if name in cotangents:
            cotangents[name] *= found[name].detach() != 0
    return cotangents


def expected(inputs, tiling, *, queries, erase):
    """(terms, gradients by leaf, cotangents) in float64."""
    inputs = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    found = recurrence(inputs, tiling, queries=queries, erase=erase)
    cotangents = with_cotangents(found)
    used = [t for name, t in inputs.items() if queries or name != "q"]
    gradients = torch.autograd.grad([found[name] for name in cotangents], used, list(cotangents.values()))
    names = [name for name in inputs if queries or name != "q"]
    return {name: t.detach() for name, t in found.items()}, {f"d_{n}": g for n, g in zip(names, gradients, strict=True)}, cotangents


def by_name(terms, inverse):
    found = {name: t for name, t in terms._asdict().items() if t is not None}
    return found | ({} if inverse is None else {"inverse": inverse})


def run(inputs, tiling, dtype, device, *, queries, erase, cotangents):
    """(terms, gradients) of the kernels, at operand type `dtype`."""
    from hope_kernels.chunk_terms import triton_

    k, q = (inputs[name].to(device, dtype) for name in ("k", "q"))
    eta, log_alpha = (inputs[name].float().to(device) for name in ("eta", "log_alpha"))
    q = q if queries else None
    terms, inverse = triton_.chunk_terms(k, q, eta, log_alpha, tiling=tiling, erase=erase)
    d_terms = triton_.Terms(*(cotangents[name].float().to(device) if name in cotangents else None for name in triton_.Terms._fields))
    gradients = triton_.chunk_terms_backward(d_terms, k, q, eta, log_alpha, terms, inverse, tiling=tiling, erase=erase)
    named = {name: t for name, t in zip(("d_k", "d_q", "d_eta", "d_log_alpha"), gradients, strict=True) if t is not None}
    return {n: t.cpu() for n, t in by_name(terms, inverse).items()}, {n: t.cpu() for n, t in named.items()}


def rounded(inputs, dtype):
    """The values that the kernel sees, in float64."""
    return {name: t.to(dtype if name in "kq" else torch.float32).double() for name, t in inputs.items()}


def compare(inputs, tiling, dtype, device, *, queries=True, erase=True):
    terms, gradients, cotangents = expected(rounded(inputs, dtype), tiling, queries=queries, erase=erase)
    got, got_gradients = run(inputs, tiling, dtype, device, queries=queries, erase=erase, cotangents=cotangents)
    exact = dtype == torch.float32
    assert not mismatches(got, terms, tolerance=FP32 if exact else BF16)
    assert not mismatches(got_gradients, gradients, tolerance=FP32 if exact else BF16_GRADIENT)


@pytest.mark.parametrize("queries", (True, False), ids=("queries", "no_queries"))
@pytest.mark.parametrize("erase", (True, False), ids=("erase", "decay_only"))
@pytest.mark.parametrize("keys", ("random", "identical"))
def test_plain_torch_terms_are_the_recurrence(keys, erase, queries):
    tiling = Tiling(11, 16, 16)
    inputs = leaves(tiling, keys=keys)
    terms, gradients, cotangents = expected(inputs, tiling, queries=queries, erase=erase)
    inputs = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    tiled = [split_tiles(inputs[name], tiling) for name in ("k", "q", "eta", "log_alpha")]
    found = fused.terms(tiled[0], tiled[1] if queries else None, *tiled[2:], erase=erase)
    got = {name: join_tiles(t.squeeze(-1), tiling) for name, t in found._asdict().items() if name in ("g", "g_prev", "w")}
    got |= {"g_end": found.g_end.flatten(1), "y": join_tiles(found.y, tiling)}
    got |= {name: join_tiles(getattr(found, name), tiling) for name in ("m", "n") if queries}
    leaf_names = [name.removeprefix("d_") for name in gradients]
    flows = torch.autograd.grad([got[name] for name in cotangents], [inputs[name] for name in leaf_names], list(cotangents.values()))
    assert not mismatches({name: t.detach() for name, t in got.items()}, {n: terms[n] for n in got}, tolerance=SCAN)
    assert not mismatches({f"d_{n}": g for n, g in zip(leaf_names, flows, strict=True)}, gradients, tolerance=SCAN)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("retention", ("mixed", "zero", "one"))
@pytest.mark.parametrize("keys", ("random", "correlated", "identical"))
def test_kernel_is_the_recurrence(keys, retention, dtype, device):
    tiling = Tiling(60, 64, 64)
    compare(leaves(tiling, rows=1, keys=keys, retention=retention), tiling, dtype, device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_kernel_at_every_cut(tiling, dtype, device):
    rows = 3 if tiling.num_tiles == 1 else 1
    compare(leaves(tiling, rows=rows, keys="correlated"), tiling, dtype, device)


@pytest.mark.parametrize("width", (20, 64, 128))
def test_kernel_at_every_width(width, device):
    tiling = Tiling(33, 32, 32)
    compare(leaves(tiling, rows=1, width=width, keys="correlated"), tiling, torch.bfloat16, device)


@pytest.mark.parametrize(("queries", "erase"), [(False, True), (True, False), (False, False)])
def test_kernel_without_queries_or_erase(queries, erase, device):
    tiling = Tiling(50, 40, 32)
    compare(leaves(tiling, rows=1), tiling, torch.float32, device, queries=queries, erase=erase)
    compare(leaves(tiling, rows=1), tiling, torch.bfloat16, device, queries=queries, erase=erase)


def test_absent_gradients_are_zero(device):
    tiling = Tiling(20, 16, 16)
    inputs = leaves(tiling)
    _, _, cotangents = expected(inputs, tiling, queries=False, erase=True)
    absent = ("g", "g_prev", "w", "g_end")
    zero = {name: torch.zeros_like(t) if name in absent else t for name, t in cotangents.items()}
    without = {name: t for name, t in cotangents.items() if name not in absent}
    results = [run(inputs, tiling, torch.float32, device, queries=False, erase=True, cotangents=c)[1] for c in (zero, without)]
    assert not mismatches(results[1], {name: t.double() for name, t in results[0].items()}, tolerance=0.0)


def test_window_of_tiles_leaves_the_rest(device):
    from hope_kernels.chunk_terms import triton_

    tiling = Tiling(50, 20, 16)
    inputs = leaves(tiling)
    _, _, cotangents = expected(inputs, tiling, queries=True, erase=True)
    whole, gradients = run(inputs, tiling, torch.float32, device, queries=True, erase=True, cotangents=cotangents)
    k, q, eta, log_alpha = (inputs[name].float().to(device) for name in ("k", "q", "eta", "log_alpha"))
    d_terms = triton_.Terms(*(cotangents[name].float().to(device) for name in triton_.Terms._fields))
    out = triton_.empty_terms(k, tiling=tiling, queries=True, erase=True)
    flows = tuple(torch.full_like(t, float("nan")) for t in (k, q, eta, log_alpha))
    tokens = torch.zeros(tiling.tokens, dtype=torch.bool)
    for chunk in (1, 0):
        tiles = tiling.tiles_of(range(chunk, chunk + 1))
        triton_.chunk_terms(k, q, eta, log_alpha, tiling=tiling, erase=True, tiles=tiles, out=out)
        triton_.chunk_terms_backward(d_terms, k, q, eta, log_alpha, *out, tiling=tiling, erase=True, tiles=tiles, out=flows)
        tokens[chunk * 20 : chunk * 20 + 20] = True
        found = by_name(*out) | dict(zip(gradients, flows, strict=True))
        for name, wanted in (whole | gradients).items():
            live = torch.arange(tiling.num_tiles) >= tiles.start if name == "g_end" else tokens
            live = live & (torch.arange(tiling.num_tiles) < 4) if name == "g_end" else live
            assert torch.equal(found[name].cpu()[:, live], wanted[:, live]), name
            assert found[name].cpu()[:, ~live].isnan().all(), name


@pytest.mark.parametrize("size", (1, 5, 16, 17, 48, 64))
def test_inverse_of_a_system(size, device):
    generator = torch.Generator().manual_seed(0)
    system = torch.rand(3, 2, size, size, generator=generator) * 0.9
    system, d_inverse = system.to(device).requires_grad_(), torch.randn(system.shape, generator=generator).to(device)
    exact = system.detach().double().requires_grad_()
    found, wanted = unit_lower_inverse(system, backend="triton"), unit_lower_inverse(exact, backend="chunked")
    flow, exact_flow = (torch.autograd.grad(x, s, d_inverse.to(x.dtype))[0] for x, s in ((found, system), (wanted, exact)))
    assert not mismatches({"inverse": found.detach()}, {"inverse": wanted.detach()}, tolerance=INVERSE)
    assert not mismatches({"system": flow}, {"system": exact_flow}, tolerance=FP32)


@pytest.mark.parametrize("keys", ("random", "correlated", "identical"))
@pytest.mark.parametrize("tile", (16, 32, 64))
def test_inverse_of_keys(tile, keys, device):
    tiling = Tiling(75, 70, tile)
    inputs = leaves(tiling, rows=1, keys=keys, retention="one", width=32)
    wanted = recurrence(rounded(inputs, torch.float32), tiling, queries=False, erase=True)["inverse"]
    arguments = [inputs[name].float().to(device) for name in ("k", "eta", "log_alpha")]
    for backend in ("triton", "chunked"):
        found = chunk_inverse(*arguments, tiling=tiling, backend=backend)
        assert not mismatches({backend: found.cpu()}, {backend: wanted}, tolerance=INVERSE)


def test_gradient_of_the_inverse_of_keys(device):
    tiling = Tiling(40, 36, 32)
    inputs = leaves(tiling, keys="correlated")
    d_inverse = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = {name: t.clone().requires_grad_() for name, t in rounded(inputs, torch.float32).items() if name != "q"}
    wanted = torch.autograd.grad(join_tiles(recurrence_inverse(exact, tiling), tiling), list(exact.values()), d_inverse)
    for backend in ("triton", "chunked"):
        taken = {name: t.detach().float().to(device).requires_grad_() for name, t in exact.items()}
        found = chunk_inverse(*taken.values(), tiling=tiling, backend=backend)
        flows = torch.autograd.grad(found, list(taken.values()), d_inverse.float().to(device))
        pairs = {name: (flow.cpu(), goal) for name, flow, goal in zip(taken, flows, wanted, strict=True)}
        assert not mismatches({n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}, tolerance=FP32)


def momentum_leaves(tiling, *, keys="correlated", retention="mixed", width=6):
    """Leaves of terms with momentum, and of a memory that uses them: W_0, S_0 and error signals of every tile."""
    inputs = leaves(tiling, keys=keys, retention=retention, width=width)
    generator = torch.Generator().manual_seed(2)
    inputs["log_mu"] = -torch.rand(inputs["eta"].shape, generator=generator, dtype=torch.float64)
    inputs["log_mu"][:, 1::3] = -20.0
    rows = len(inputs["k"])
    for name, shape in (("weight", (rows, tiling.num_tiles, 5, width)), ("slow", (rows, tiling.num_tiles, 5, width))):
        inputs[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs["delta"] = torch.randn(rows, tiling.tokens, 5, generator=generator, dtype=torch.float64)
    return inputs


def momentum_recurrence(leaf, tiling, *, erase):
    """(reads [L, T, 5], W and S at every tile's end) token by token, each tile from its own W_0 and S_0."""
    reads, weights, slows = [], [], []
    for tile in range(tiling.num_tiles):
        weight, slow = leaf["weight"][:, tile], leaf["slow"][:, tile]
        first = tile // tiling.per_chunk * tiling.chunk + tile % tiling.per_chunk * tiling.tile
        for t in range(first, min(first + tiling.tile, (tile // tiling.per_chunk + 1) * tiling.chunk, tiling.tokens)):
            x, delta = leaf["k"][:, t, None, :], leaf["delta"][:, t, :, None]
            eta, alpha, mu = (leaf[name][:, t, None, None] for name in ("eta", "log_alpha", "log_mu"))
            slow = mu.exp() * slow - eta * delta * x
            weight = alpha.exp() * weight - (eta * (weight @ x.mT) * x if erase else 0) + slow
            reads.append((weight @ leaf["q"][:, t, :, None]).squeeze(-1))
        weights.append(weight)
        slows.append(slow)
    return {"reads": torch.stack(reads, 1), "weight": torch.stack(weights, 1), "slow": torch.stack(slows, 1)}


def by_momentum_terms(leaf, tiling, *, erase, backend):
    """The same from the terms, as `MomentumTerms` says."""
    from hope_kernels.chunk_terms.momentum import momentum_terms

    k, q = leaf["k"], leaf["q"]
    terms = momentum_terms(k, q, leaf["eta"], leaf["log_alpha"], leaf["log_mu"], tiling=tiling, erase=erase, backend=backend)
    t = {name: None if x is None else x if name in ENDS else split_tiles(x, tiling) for name, x in terms._asdict().items()}
    x, q, delta = (split_tiles(leaf[name], tiling) for name in ("k", "q", "delta"))
    weight, slow = leaf["weight"], leaf["slow"]
    reads = t["g"][..., None] * (q @ weight.mT) + t["kappa"][..., None] * (q @ slow.mT) - t["m_delta"] @ delta
    end = t["g_end"][..., None, None] * weight + t["kappa_end"][..., None, None] * slow - delta.mT @ t["y_delta"]
    if erase:
        r = t["g_prev"][..., None] * (x @ weight.mT) + t["kappa_prev"][..., None] * (x @ slow.mT)
        reads, end = reads - t["m"] @ r, end - r.mT @ t["y"]
    else:  # what a layer of other inputs needs: here of the same
        same = {"n": t["n"] * (q @ x.mT), "w": t["w"][..., None] * x}
        assert not mismatches(same, {"n": t["m_delta"], "w": t["y_delta"]}, tolerance=FP32 if q.dtype == torch.float32 else REPEAT)
    slow_end = t["mu_total"][..., None, None] * slow - (t["u"][..., None] * delta).mT @ x
    return {"reads": join_tiles(reads, tiling), "weight": end, "slow": slow_end}


def with_flows(function, inputs, **options):
    """Results of a function of leaves, and the gradients of a fixed random combination of them."""
    leaf = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    found = function(leaf, **options)
    cotangents = with_cotangents(found)
    flows = torch.autograd.grad(list(found.values()), list(leaf.values()), [cotangents[n].to(t) for n, t in found.items()])
    return {n: t.detach() for n, t in found.items()}, {f"d_{n}": t for n, t in zip(leaf, flows, strict=True)}


@pytest.mark.parametrize("erase", (True, False), ids=("erase", "decay_only"))
@pytest.mark.parametrize("retention", ("mixed", "zero", "one"))
@pytest.mark.parametrize("name", ("one token", "chunks of several tiles", "last chunk of fewer tiles"))
def test_momentum_terms_are_the_recurrence(name, retention, erase):
    tiling = TILINGS[name]
    inputs = momentum_leaves(tiling, retention=retention)
    wanted, wanted_flows = with_flows(momentum_recurrence, inputs, tiling=tiling, erase=erase)
    found, flows = with_flows(by_momentum_terms, inputs, tiling=tiling, erase=erase, backend="chunked")
    assert not mismatches(found, wanted, tolerance=SCAN)
    assert not mismatches(flows, wanted_flows, tolerance=SCAN)


@pytest.mark.parametrize("keys", ("random", "correlated", "identical"))
@pytest.mark.parametrize("retention", ("mixed", "zero", "one"))
def test_momentum_terms_in_fp32(retention, keys, device):
    tiling = Tiling(60, 64, 64)
    inputs = momentum_leaves(tiling, keys=keys, retention=retention, width=24)
    wanted, wanted_flows = with_flows(momentum_recurrence, rounded(inputs, torch.float32), tiling=tiling, erase=True)
    taken = {name: t.float().to(device) for name, t in inputs.items()}
    found, flows = with_flows(by_momentum_terms, taken, tiling=tiling, erase=True, backend="triton")
    assert not mismatches({n: t.cpu() for n, t in found.items()}, wanted, tolerance=FP32)
    assert not mismatches({n: t.cpu() for n, t in flows.items()}, wanted_flows, tolerance=FP32)


@pytest.mark.parametrize("keys", ("random", "identical"))
def test_momentum_terms_in_bf16(keys, device):
    from hope_kernels.chunk_terms.momentum import momentum_terms

    tiling = Tiling(75, 70, 64)
    inputs = momentum_leaves(tiling, keys=keys, width=24)
    names = ("k", "q", "eta", "log_alpha", "log_mu")
    exact = [rounded(inputs, torch.bfloat16)[name] for name in names]
    taken = [t.to(device, torch.bfloat16 if name in "kq" else torch.float32) for name, t in zip(names, exact, strict=True)]
    found, wanted = (momentum_terms(*arguments, tiling=tiling, erase=True)._asdict() for arguments in (taken, exact))
    assert not mismatches({name: t.cpu() for name, t in found.items()}, wanted, tolerance=BF16)


def recurrence_inverse(inputs, tiling):
    x, eta, log_alpha = (split_tiles(inputs[name], tiling) for name in ("k", "eta", "log_alpha"))
    return reference.terms(x, None, eta, log_alpha, erase=True)[1]


def test_registered_operators(device, monkeypatch):
    from hope_kernels.chunk_terms import triton_

    monkeypatch.undo()  # tracing allocates more types than the poison knows
    system = torch.rand(2, 16, 16, device=device).requires_grad_()
    torch.library.opcheck(triton_.unit_lower_inverse, (system, True))
    tiling = Tiling(20, 20, 16)
    arguments = [leaves(tiling)[name].float().to(device).requires_grad_() for name in ("k", "eta", "log_alpha")]
    torch.library.opcheck(triton_.chunk_inverse, (*arguments, 20, 16))


def test_refused_backends(device):
    with pytest.raises(ValueError, match="instead of float32"):
        unit_lower_inverse(torch.zeros(2, 16, 16, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="80 rows are more than 64"):
        unit_lower_inverse(torch.zeros(80, 80, device=device), backend="triton")
    assert unit_lower_inverse(torch.zeros(80, 80), backend="auto").equal(torch.eye(80))
