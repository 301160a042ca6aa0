"""Known models are settings of the same scan (SPEC 2.3): compared with plain loops written here and with flash-linear-attention.

flash-linear-attention (fla-core) is an independent implementation by other people; its naive references run in fp32 on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F

from hope_kernels.memory_scan import memory_scan
from hope_kernels.rule import MemoryRule, MemoryState
from hope_pt.testing.scans import SCAN, Size, memory_leaves, mismatches

FLA = 2e-6
"""The oracle computes in fp32 whatever it is given: 2^-24 times some tens of roundings."""
SIZE = Size(batch=2, heads=3, tokens=19, width=6)
BACKENDS = ["chunked", "reference"]
GATED_DELTA = MemoryRule(memory="linear", objective="dot", self_target=False)
LINEAR_ATTENTION = MemoryRule(memory="linear", objective="dot", update="gd", self_target=False)


def case(rule: MemoryRule, **options) -> tuple[dict[str, torch.Tensor], MemoryState]:
    """Leaves and a zero memory of the linear form, or a random one."""
    leaves = memory_leaves(rule, size=SIZE, **options)
    count = rule.num_layers
    carried = [leaves[f"state.{i}"] for i in range(count * (2 if rule.momentum else 1))]
    return leaves, MemoryState(tuple(carried[:count]), tuple(carried[count:]))


def scan(leaves, state, rule, *, chunk, backend="chunked", read="causal"):
    """(y, end state) of a memory scan over the leaves."""
    q, k, v, eta, log_alpha = (leaves[name] for name in ("q", "k", "v", "eta", "log_alpha"))
    return memory_scan(q, k, v, eta, log_alpha, state, rule=rule, chunk=chunk, log_mu_BHT=leaves.get("log_mu"), read=read, backend=backend)


def tokens(leaves):
    """Per token: column vectors q, k, v [B, H, K, 1] and scalars eta, alpha, mu [B, H, 1, 1]."""
    for t in range(leaves["q"].shape[2]):
        columns = [leaves[name][:, :, t].unsqueeze(-1) for name in ("q", "k", "v")]
        alpha, mu = leaves["log_alpha"], leaves.get("log_mu", torch.full_like(leaves["eta"], float("-inf")))
        yield *columns, *(g[:, :, t, None, None] for g in (leaves["eta"], alpha.exp(), mu.exp()))


def agrees(got, wanted) -> bool:
    """Both outputs and end states, to the tolerance of a scan."""
    pairs = [dict(zip(("y", "end"), pair, strict=True)) for pair in (got, wanted)]
    return mismatches(*pairs, tolerance=SCAN) == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_memory_dgd_and_dot_product_are_the_gated_delta_rule(chunk, backend):
    leaves, state = case(GATED_DELTA, keys="correlated")
    w, outputs = state.weights[0], []
    for q, k, v, eta, alpha, _ in tokens(leaves):
        w = alpha * w - eta * (w @ k - v) @ k.mT
        outputs.append((w @ q).squeeze(-1))
    y, end = scan(leaves, state, GATED_DELTA, chunk=chunk, backend=backend)
    assert agrees((y, end.weights[0]), (torch.stack(outputs, 2), w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_memory_gd_and_dot_product_are_linear_attention_with_decay(chunk, backend):
    """As attention: y_t = g_t W_0 q_t + sum over s <= t of (g_t / g_s) eta_s (k_s . q_t) v_s, with no recurrence at all."""
    leaves, state = case(LINEAR_ATTENTION)
    log_g = leaves["log_alpha"].cumsum(-1)
    ratio = (log_g.unsqueeze(-1) - log_g.unsqueeze(-2)).exp().tril()
    scores = leaves["q"] @ leaves["k"].mT * ratio * leaves["eta"].unsqueeze(-2)
    wanted = scores @ leaves["v"] + log_g.exp().unsqueeze(-1) * leaves["q"] @ state.weights[0].mT
    y, _ = scan(leaves, state, LINEAR_ATTENTION, chunk=chunk, backend=backend)
    assert mismatches({"y": y}, {"y": wanted}, tolerance=SCAN) == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_linear_memory_gd_and_l2_are_ttt_linear(chunk, backend):
    """TTT-Linear without its norm: a mini-batch of gradients of 1/2 |W k - v|^2 at the weights of its start."""
    rule = MemoryRule(memory="linear", objective="l2", update="gd", self_target=False)
    leaves, state = case(rule)
    leaves["log_alpha"] = torch.zeros_like(leaves["log_alpha"])
    w = anchor = state.weights[0]
    outputs = []
    for t, (q, k, v, eta, _, _) in enumerate(tokens(leaves)):
        anchor = w if t % chunk == 0 else anchor
        w = w - eta * (anchor @ k - v) @ k.mT
        outputs.append((w @ q).squeeze(-1))
    y, end = scan(leaves, state, rule, chunk=chunk, backend=backend)
    assert agrees((y, end.weights[0]), (torch.stack(outputs, 2), w))


def mlp_gradients(w2, w1, k, v):
    """Gradients of 1/2 |k + W1 silu(W2 k) - v|^2 with respect to both weights, by autograd."""
    w2, w1 = w2.detach().requires_grad_(), w1.detach().requires_grad_()
    loss = (k + w1 @ F.silu(w2 @ k) - v).square().sum() / 2
    return torch.autograd.grad(loss, (w2, w1))


@pytest.mark.parametrize("momentum", [True, False], ids=["titans", "ttt-mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_mlp_memory_gd_is_titans_with_momentum_and_ttt_mlp_without(chunk, backend, momentum):
    """Titans LMM: S = mu S - eta grad, W = alpha W + S (its eq. 13-14); TTT-MLP: alpha = 1 and no momentum."""
    rule = MemoryRule(objective="l2", update="gd", self_target=False, momentum=momentum)
    leaves, state = case(rule, eta_max=0.2)
    if not momentum:
        leaves["log_alpha"] = torch.zeros_like(leaves["log_alpha"])
    weights = anchor = state.weights
    slow = state.momentum or tuple(torch.zeros_like(w) for w in weights)
    outputs = []
    for t, (q, k, v, eta, alpha, mu) in enumerate(tokens(leaves)):
        anchor = weights if t % chunk == 0 else anchor
        slow = [mu * s - eta * g for s, g in zip(slow, mlp_gradients(*anchor, k, v), strict=True)]
        weights = [alpha * w + s for w, s in zip(weights, slow, strict=True)]
        outputs.append((q + weights[1] @ F.silu(weights[0] @ q)).squeeze(-1))
    y, end = scan(leaves, state, rule, chunk=chunk, backend=backend)
    assert agrees((y, end.weights[0]), (torch.stack(outputs, 2), weights[0]))
    assert agrees((y, end.weights[1]), (torch.stack(outputs, 2), weights[1]))


@pytest.mark.parametrize("rule", [MemoryRule(), MemoryRule(dgd_scope="layerwise"), GATED_DELTA], ids=["mlp", "layerwise", "linear"])
def test_without_learning_rate_and_forgetting_it_is_a_static_network(rule):
    leaves, state = case(rule)
    leaves |= {name: torch.zeros_like(leaves[name]) for name in ("eta", "log_alpha")}
    q, weights = leaves["q"], state.weights
    wanted = q @ weights[0].mT if rule.memory == "linear" else q + F.silu(q @ weights[0].mT) @ weights[1].mT
    for read in ("causal", "anchor"):
        y, end = scan(leaves, state, rule, chunk=4, read=read)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(end.weights, weights, strict=True))


@pytest.mark.parametrize("rule", [MemoryRule(), MemoryRule(dgd_scope="layerwise", objective="l2")], ids=["default", "layerwise"])
def test_chunks_of_one_token_are_delta_gradient_descent_token_by_token(rule):
    """NL eq. 88 with momentum off, written out: W2 has the factor alpha I - eta k k^T, W1 retention (or its own factor)."""
    leaves, state = case(rule)
    w2, w1 = state.weights
    outputs = []
    for q, k, v, eta, alpha, _ in tokens(leaves):
        hidden, pre = F.silu(w2 @ k), w2 @ k
        error = k + w1 @ hidden - (v + w1 @ F.silu(w2 @ v))
        slope = pre.sigmoid() * (1 + pre * (1 - pre.sigmoid()))
        if rule.objective == "huber":
            error = error / (1 + error.square().sum(-2, keepdim=True)).sqrt()
        delta = (w1.mT @ error) * slope
        if rule.objective == "huber":
            delta = delta / (1 + delta.square().sum(-2, keepdim=True)).sqrt()
        if rule.dgd_scope == "layerwise":
            hidden = hidden / (hidden.square().sum(-2, keepdim=True) + 1e-6).sqrt()
        erased = eta * w1 @ hidden @ hidden.mT if rule.dgd_scope == "layerwise" else 0
        w2 = alpha * w2 - eta * (w2 @ k) @ k.mT - eta * delta @ k.mT
        w1 = alpha * w1 - erased - eta * error @ hidden.mT
        outputs.append((q + w1 @ F.silu(w2 @ q)).squeeze(-1))
    y, end = scan(leaves, state, rule, chunk=1)
    wanted = torch.stack(outputs, 2)
    assert agrees((y, end.weights[0]), (wanted, w2)) and agrees((y, end.weights[1]), (wanted, w1))


def fla(module: str):
    """A module of flash-linear-attention's naive references; the test is skipped where it is not installed."""
    return pytest.importorskip(f"fla.ops.{module}.naive", reason="fla-core is not installed: pip install --no-deps fla-core einops")


def by_time(leaves, *names: str) -> list[torch.Tensor]:
    """Leaves in fla's layout, [B, T, H, ...]."""
    return [leaves[name].transpose(1, 2).float() for name in names]


def close_to_fla(y, end, other_y, other_end) -> bool:
    """fla has [B, T, H, K] outputs and [B, H, K, V] states."""
    got = {"y": y.transpose(1, 2), "end": end.weights[0].mT}
    return mismatches(got, {"y": other_y, "end": other_end}, tolerance=FLA) == {}


@pytest.mark.parametrize("chunk", [1, 8])
def test_gated_delta_rule_of_fla(chunk):
    """It decays before it computes the error: beta = eta / alpha and v scaled by alpha (SPEC 2.1)."""
    oracle = fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    leaves, state = case(GATED_DELTA)
    q, k, v, eta, log_alpha = by_time(leaves, "q", "k", "v", "eta", "log_alpha")
    alpha = log_alpha.exp()
    other = oracle(
        q, k, alpha.unsqueeze(-1) * v, eta / alpha, log_alpha, 1.0, initial_state=state.weights[0].mT.float(), output_final_state=True
    )
    assert close_to_fla(*scan(leaves, state, GATED_DELTA, chunk=chunk), *other)


@pytest.mark.parametrize("chunk", [1, 8])
def test_linear_attention_with_decay_of_fla(chunk):
    oracle = fla("simple_gla").naive_recurrent_simple_gla
    leaves, state = case(LINEAR_ATTENTION)
    q, k, v, eta, log_alpha = by_time(leaves, "q", "k", "v", "eta", "log_alpha")
    other = oracle(q, k, eta.unsqueeze(-1) * v, log_alpha, 1.0, initial_state=state.weights[0].mT.float())
    assert close_to_fla(*scan(leaves, state, LINEAR_ATTENTION, chunk=chunk), *other)


def momentum_delta_rule(leaves, state):
    """fla's momentum delta rule of the leaves: M = mu M - eta k (v - W k)^T, W = alpha W - M, error at the current weights."""
    oracle = fla("momentum_delta_rule").recurrent_momentum_delta_rule_ref
    q, k, v, eta, log_alpha = by_time(leaves, "q", "k", "v", "eta", "log_alpha")
    log_mu = by_time(leaves, "log_mu")[0] if "log_mu" in leaves else torch.full_like(eta, -1e9)
    slow = -state.momentum[0].mT.float() if state.momentum else None
    y, end = oracle(
        q, k, v, log_alpha, log_mu, k, beta=torch.ones_like(eta), eta=eta, scale=1.0,
        initial_S=state.weights[0].mT.float(), initial_M=slow, output_final_state=True,
    )  # fmt: skip
    return y, end[0]


def test_dgd_is_the_momentum_delta_rule_of_fla_without_momentum():
    leaves, state = case(GATED_DELTA)
    assert close_to_fla(*scan(leaves, state, GATED_DELTA, chunk=8), *momentum_delta_rule(leaves, state))


def test_titans_with_a_linear_memory_is_the_momentum_delta_rule_of_fla():
    """l2 gradients at every token's own weights (chunks of one token), with momentum and retention."""
    rule = MemoryRule(memory="linear", objective="l2", update="gd", self_target=False, momentum=True)
    leaves, state = case(rule, eta_max=0.3)
    assert close_to_fla(*scan(leaves, state, rule, chunk=1), *momentum_delta_rule(leaves, state))
