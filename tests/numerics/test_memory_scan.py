"""The chunked memory scan is the token recurrence: values, end states and every gradient, for every setting, in awkward regimes."""

import itertools

import pytest
import torch

from hope_kernels.memory_scan import memory_scan
from hope_kernels.rule import MemoryRule, MemoryState
from hope_pt.testing.scans import (
    KEYS,
    REPEAT,
    RETENTIONS,
    SCAN,
    SCAN_FP32,
    Size,
    memory_leaves,
    mismatches,
    random_masks,
    run_memory,
    states,
)

CHUNK = 4
UPDATES = {"mlp": [("dgd", "first"), ("dgd", "layerwise"), ("gd", "first")], "linear": [("dgd", "first"), ("gd", "first")]}


def every_rule() -> list[MemoryRule]:
    """All settings of a memory that differ."""
    rules = []
    for memory in UPDATES:
        for (update, scope), momentum, objective, self_target, normalize in itertools.product(
            UPDATES[memory], (False, True), ("huber", "l2", "dot"), (True, False), (False, True)
        ):
            rules.append(MemoryRule(memory, objective, 0.7, update, scope, momentum, self_target, normalize))
    return rules


def label(value) -> str:
    """A readable test id."""
    if not isinstance(value, MemoryRule):
        return str(value)
    flags = {"momentum": value.momentum, "self": value.self_target, "normalized": value.normalize_v}
    scope = "-layerwise" if value.dgd_scope == "layerwise" else ""
    return "-".join([value.memory, value.objective, value.update + scope, *(name for name, on in flags.items() if on)])


SAMPLE = [
    MemoryRule(),
    MemoryRule(momentum=True),
    MemoryRule(dgd_scope="layerwise", momentum=True, objective="l2"),
    MemoryRule(memory="linear", objective="dot", self_target=False),
    MemoryRule(update="gd", objective="l2", self_target=False, momentum=True),
]
"""The default, and a rule for every term of the chunk form."""


@pytest.mark.parametrize("read", ["causal", "anchor"])
@pytest.mark.parametrize("rule", every_rule(), ids=label)
def test_every_setting(rule, read):
    size = Size()
    leaves = memory_leaves(rule, size=size)
    masks = random_masks(size, CHUNK)
    got, wanted = (run_memory(leaves, rule, chunk=CHUNK, backend=b, read=read, masks=masks) for b in ("chunked", "reference"))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize(("keys", "retention", "eta_max"), list(itertools.product(KEYS, RETENTIONS, (0.05, 1.0))))
@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_awkward_inputs(rule, keys, retention, eta_max):
    leaves = memory_leaves(rule, keys=keys, retention=retention, eta_max=eta_max)
    got, wanted = (run_memory(leaves, rule, chunk=CHUNK, backend=b) for b in ("chunked", "reference"))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize("size", [Size(tokens=t) for t in (1, 7, 8, 21)] + [Size(batch=1, heads=1), Size(batch=5, hidden=9)], ids=str)
@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_awkward_sizes(rule, size):
    """One token, fewer than a chunk, a whole chunk, not a multiple; one head, odd batch."""
    leaves = memory_leaves(rule, size=size, keys="correlated")
    got, wanted = (run_memory(leaves, rule, chunk=8, backend=b) for b in ("chunked", "reference"))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_fp32(rule):
    leaves = memory_leaves(rule, size=Size(tokens=33), keys="correlated", eta_max=0.3)
    wanted = run_memory(leaves, rule, chunk=16, backend="reference")
    got = run_memory({name: t.float() for name, t in leaves.items()}, rule, chunk=16, backend="chunked")
    assert mismatches(got, wanted, tolerance=SCAN_FP32) == {}


@pytest.mark.parametrize("save_every", [1, 8, 12, 1000])
@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_replay_in_backward_changes_nothing(rule, save_every):
    size = Size(tokens=22)
    leaves = memory_leaves(rule, size=size)
    masks = random_masks(size, CHUNK)
    got = run_memory(leaves, rule, chunk=CHUNK, backend="chunked", masks=masks, save_every=save_every)
    wanted = run_memory(leaves, rule, chunk=CHUNK, backend="chunked", masks=masks, save_every=16)
    assert mismatches(got, wanted, tolerance=REPEAT) == {}


def run_in_parts(leaves, rule, *, cuts, chunk):
    """Outputs and gradients of the scan of consecutive parts with the state carried between them."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    state, _ = states(leaves, rule)
    outputs = []
    for first, end in itertools.pairwise(cuts):
        q, k, v, eta, log_alpha = (leaves[name][:, :, first:end] for name in ("q", "k", "v", "eta", "log_alpha"))
        log_mu = leaves["log_mu"][:, :, first:end] if rule.momentum else None
        y, state = memory_scan(q, k, v, eta, log_alpha, state, rule=rule, chunk=chunk, log_mu_BHT=log_mu)
        outputs.append(y)
    y = torch.cat(outputs, 2)
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum() + sum((t**2).sum() for t in state.tensors())
    names = [name for name in leaves if not name.startswith("start")]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    return {"y": y, **{f"end.{i}": t for i, t in enumerate(state.tensors())}, **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("cuts", [(0, 4, 11), (0, 8, 11), (0, 4, 8, 11)], ids=str)
@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_parts_with_a_carried_state_equal_the_whole(rule, cuts):
    leaves = memory_leaves(rule)
    got, wanted = (run_in_parts(leaves, rule, cuts=c, chunk=CHUNK) for c in (cuts, (0, 11)))
    assert mismatches(got, wanted, tolerance=REPEAT) == {}


@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_chunks_of_one_token_are_the_plain_recurrence(rule):
    """Every token sees its predecessor's state as anchor: the written W2 of token t is exactly what token t + 1 starts from."""
    leaves = memory_leaves(rule, size=Size(tokens=6))
    got = run_memory(leaves, rule, chunk=1, backend="chunked")
    wanted = run_in_parts(leaves, rule, cuts=range(7), chunk=64)
    assert mismatches({"y": got["y"]}, {"y": wanted["y"]}, tolerance=REPEAT) == {}
    assert mismatches(got, run_memory(leaves, rule, chunk=1, backend="reference"), tolerance=SCAN) == {}


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
def test_permuting_rows_or_heads_permutes_the_result(dim):
    rule = MemoryRule(momentum=True)
    leaves = {name: t for name, t in memory_leaves(rule).items() if not name.startswith("start")}
    count = leaves["q"].shape[dim]
    order = torch.arange(count).roll(1)
    start = {name: t[0] for name, t in leaves.items() if name in ("state.0", "state.1")}
    start = {name.replace("state", "start"): t for name, t in start.items()}
    wanted = run_memory(leaves | start, rule, chunk=CHUNK, backend="chunked")
    got = run_memory({name: t.index_select(dim, order) for name, t in leaves.items()} | start, rule, chunk=CHUNK, backend="chunked")
    for name in ("y", "end.0", "end.1", "end.2", "end.3"):
        assert mismatches({name: got[name]}, {name: wanted[name].index_select(dim, order)}, tolerance=REPEAT) == {}


@pytest.mark.parametrize("rule", SAMPLE, ids=label)
def test_a_token_without_learning_rate_and_forgetting_is_a_no_op(rule):
    """eta = 0 and alpha = 1 leave the state where it is, inserted anywhere (with momentum also mu = 1 and no momentum to carry on)."""
    leaves = memory_leaves(rule, size=Size(tokens=5))
    leaves |= {name: torch.zeros_like(t) for name, t in leaves.items() if name in ("eta", "log_alpha", "log_mu", "state.2", "state.3")}
    result = run_memory(leaves, rule, chunk=CHUNK, backend="chunked")
    for i in range(rule.num_layers):
        torch.testing.assert_close(result[f"end.{i}"], leaves[f"state.{i}"], rtol=0, atol=0)


@pytest.mark.parametrize(("chunk", "backend"), [(1, "chunked"), (8, "chunked"), (8, "reference")])
@pytest.mark.parametrize("rule", [r for r in every_rule() if r.objective == "huber"], ids=label)
def test_bounded_surprise(rule, chunk, backend):
    """With the bounded error a token changes W2 by at most eta |k| and W1 by at most eta |input|, however far off the memory is."""
    leaves = memory_leaves(rule, size=Size(tokens=chunk), eta_max=1.0)
    leaves |= {name: 1e3 * t for name, t in leaves.items() if name in ("v", "state.0", "state.1")}
    leaves["log_alpha"] = torch.zeros_like(leaves["log_alpha"])
    if rule.momentum:  # mu = 0: what is left of it is the write of this token
        leaves["log_mu"] = torch.full_like(leaves["log_mu"], -1e9)
    result = run_memory(leaves, rule, chunk=chunk, backend=backend)
    pre = leaves["k"] @ leaves["state.0"].mT
    for layer in range(rule.num_layers):
        before = leaves[f"state.{layer}"].norm(dim=(-2, -1))
        length = leaves["k"].norm(dim=-1) if layer == 0 else torch.nn.functional.silu(pre).norm(dim=-1)
        if rule.erases(layer):
            # the erase only shrinks, so the norm can grow by the writes alone; the layerwise input has unit length
            moved = result[f"end.{layer}"].norm(dim=(-2, -1)) - before
            length = torch.ones_like(length)
        else:
            moved = (result[f"end.{layer}"] - leaves[f"state.{layer}"]).norm(dim=(-2, -1))
        limit = rule.huber_delta * (leaves["eta"] * length).sum(-1)
        assert (moved <= limit * (1 + 1e-9) + 1e-9).all()


def test_the_literal_objective_is_not_bounded():
    """The property above can fail: without the bound one token moves W2 by more than eta."""
    rule = MemoryRule(objective="l2", update="gd")
    leaves = memory_leaves(rule, size=Size(tokens=1), eta_max=1.0)
    leaves |= {"v": 1e3 * leaves["v"], "log_alpha": torch.zeros_like(leaves["log_alpha"])}
    moved = run_memory(leaves, rule, chunk=1, backend="chunked")["end.0"] - leaves["state.0"]
    assert (moved.norm(dim=(-2, -1)) > leaves["eta"][..., 0]).any()


def test_the_comparison_notices_a_wrong_gradient():
    wanted = run_memory(memory_leaves(MemoryRule()), MemoryRule(), chunk=CHUNK, backend="reference")
    assert mismatches(wanted | {"dlog_alpha": wanted["dlog_alpha"] * (1 + 1e-9)}, wanted, tolerance=SCAN).keys() == {"dlog_alpha"}
    assert mismatches(wanted | {"y": wanted["y"] * float("nan")}, wanted, tolerance=SCAN).keys() == {"y"}


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        (MemoryRule(), {"read": "end"}, "neither"),
        (MemoryRule(momentum=True), {}, "missing"),
        (MemoryRule(), {"log_mu_BHT": 0}, "was given"),
    ],
)
def test_wrong_calls_are_refused(rule, changes, message):
    leaves = memory_leaves(MemoryRule(), size=Size(tokens=2))
    q, k, v, eta, log_alpha = (leaves[name] for name in ("q", "k", "v", "eta", "log_alpha"))
    with pytest.raises(ValueError, match=message):
        memory_scan(q, k, v, eta, log_alpha, MemoryState(()), rule=rule, chunk=4, **changes)
