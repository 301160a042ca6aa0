"""The chunked projection scan is the token recurrence of every generating memory alone: values, end states and every gradient."""

import itertools

import pytest
import torch

from hope_kernels.projection_scan import Inputs, Readout, projection_scan
from hope_kernels.rule import MemoryRule
from hope_pt.testing.scans import (
    REPEAT,
    SCAN,
    SCAN_FP32,
    STACK,
    Size,
    mismatches,
    projection_leaves,
    random_masks,
    run_projection,
    states,
)

CHUNK = 4
SAMPLE = [
    MemoryRule(),
    MemoryRule(momentum=True),
    MemoryRule(dgd_scope="layerwise", momentum=True, objective="l2"),
    MemoryRule(memory="linear", objective="l2"),
    MemoryRule(update="gd", self_target=False, normalize_v=True),
]
NAMES = ["default", "momentum", "layerwise-momentum-l2", "linear-l2", "gd-normalized"]
STACKS = [STACK, ("k", "eta", "alpha", "v", "q"), ("v",), ("eta", "alpha"), ("q",), ()]
UPDATES = [(memory, update, "first") for memory in ("mlp", "linear") for update in ("dgd", "gd")] + [("mlp", "dgd", "layerwise")]
SMALL = Size(batch=2, tokens=7)


def both(leaves, rule, **options):
    """(chunked, reference) runs."""
    return tuple(run_projection(leaves, rule, chunk=CHUNK, backend=backend, **options) for backend in ("chunked", "reference"))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("self_target", [True, False], ids=["self", "given"])
@pytest.mark.parametrize("objective", ["huber", "l2", "dot"])
@pytest.mark.parametrize("momentum", [False, True], ids=["no-momentum", "momentum"])
@pytest.mark.parametrize("update", UPDATES, ids="-".join)
def test_every_setting(update, momentum, objective, self_target, normalize):
    memory, kind, scope = update
    rule = MemoryRule(memory, objective, 0.7, kind, scope, momentum, self_target, normalize)
    got, wanted = both(projection_leaves(rule, size=SMALL), rule, masks=random_masks(SMALL, CHUNK, seed=3))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize("stack", STACKS, ids=lambda names: "+".join(names) or "all-static")
@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_every_choice_of_generated_streams(rule, stack):
    got, wanted = both(projection_leaves(rule, size=SMALL, stack=stack), rule, stack=stack)
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize("size", [Size(tokens=t) for t in (1, 3, 4, 13)] + [Size(batch=1, heads=1), Size(hidden=9)], ids=str)
@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_awkward_sizes(rule, size):
    """One token, fewer than a chunk, a whole chunk, not a multiple; one head, odd batch; masks of commits and returns."""
    got, wanted = both(projection_leaves(rule, size=size), rule, masks=random_masks(size, CHUNK))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


@pytest.mark.parametrize("bias", [-1e3, 1e3], ids=["eta-0-alpha-1", "eta-max-alpha-half"])
@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_saturated_gates(rule, bias):
    """Gates at both ends of their range: eta 0 and alpha 1, or eta at its maximum and alpha at its floor of one half."""
    leaves = projection_leaves(rule)
    leaves |= {name: torch.full_like(leaves[name], bias) for name in ("readout.1", "readout.3")}
    got, wanted = both(leaves, rule)
    assert mismatches(got, wanted, tolerance=SCAN) == {}
    eta, alpha = (0.0, 1.0) if bias < 0 else (0.8, 0.5)
    torch.testing.assert_close(got["eta"], torch.full_like(got["eta"], eta), atol=1e-9, rtol=0)
    torch.testing.assert_close(got["log_alpha"].exp(), torch.full_like(got["eta"], alpha), atol=1e-9, rtol=0)


@pytest.mark.parametrize("identical", [False, True], ids=["random", "identical-keys"])
@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_no_op_positions_and_identical_keys(rule, identical):
    size = Size()
    leaves = projection_leaves(rule, size=size)
    if identical:
        leaves["k"] = leaves["k"][:, :, :1].expand_as(leaves["k"]).clone()
    live = (torch.rand(size.batch, 1, size.tokens, generator=torch.Generator().manual_seed(2)) > 0.4).double()
    got, wanted = both(leaves, rule, live=live)
    assert mismatches(got, wanted, tolerance=SCAN) == {}
    assert (got["eta"] * (1 - live) == 0).all() and (got["log_alpha"] * (1 - live) == 0).all()


@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_fp32(rule):
    leaves = projection_leaves(rule, size=Size(tokens=17))
    wanted = run_projection(leaves, rule, chunk=8, backend="reference")
    got = run_projection({name: t.float() for name, t in leaves.items()}, rule, chunk=8, backend="chunked")
    assert mismatches(got, wanted, tolerance=SCAN_FP32) == {}


@pytest.mark.parametrize("save_every", [1, 8, 1000])
@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_replay_in_backward_changes_nothing(rule, save_every):
    size = Size(tokens=22)
    leaves = projection_leaves(rule, size=size)
    masks = random_masks(size, CHUNK)
    got, wanted = (
        run_projection(leaves, rule, chunk=CHUNK, backend="chunked", masks=masks, save_every=every) for every in (save_every, 16)
    )
    assert mismatches(got, wanted, tolerance=REPEAT) == {}


@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_chunks_of_one_token(rule):
    leaves = projection_leaves(rule, size=Size(tokens=6))
    got, wanted = (run_projection(leaves, rule, chunk=1, backend=backend) for backend in ("chunked", "reference"))
    assert mismatches(got, wanted, tolerance=SCAN) == {}


def run_in_parts(leaves, rule, cuts):
    """Outputs and end state of consecutive parts with the state carried between them."""
    state, _ = states(leaves, rule)
    readout = Readout(*(leaves[f"readout.{i}"] for i in range(4)))
    inputs = Inputs(leaves["k"], leaves["v"], leaves["q"], None, leaves.get("log_mu"))
    parts = []
    for first, end in itertools.pairwise(cuts):
        part, state = projection_scan(inputs.window(slice(first, end)), readout, state, rule=rule, stack=STACK, chunk=CHUNK)
        parts.append(part.tensors())
    joined = {str(i): torch.cat(pieces, 2) for i, pieces in enumerate(zip(*parts, strict=True))}
    return joined | {f"end.{i}": t for i, t in enumerate(state.tensors())}


@pytest.mark.parametrize("rule", SAMPLE, ids=NAMES)
def test_parts_with_a_carried_state_equal_the_whole(rule):
    leaves = projection_leaves(rule)
    whole = run_in_parts(leaves, rule, (0, 11))
    for cuts in ((0, 4, 11), (0, 8, 11), (0, 4, 8, 11)):
        assert mismatches(run_in_parts(leaves, rule, cuts), whole, tolerance=REPEAT) == {}


@pytest.mark.parametrize(("retention", "writes"), [(False, True), (True, False), (False, False)])
def test_control_switches(retention, writes):
    """No retention is alpha = 1; no writes is eta = 0 and alpha = 1 and leaves every memory where it was."""
    leaves = projection_leaves(MemoryRule())
    got, wanted = both(leaves, MemoryRule(), retention=retention, writes=writes)
    assert mismatches(got, wanted, tolerance=SCAN) == {}
    assert (got["log_alpha"] == 0).all()
    assert (got["eta"] == 0).all() != writes
    unmoved = all(torch.equal(got[f"end.{i}"], leaves[f"state.{i}"]) for i in range(2))
    assert unmoved != writes


def test_generated_keys_have_unit_length_and_gates_their_ranges():
    """Also where a stream is exactly zero, as after a padded start: the norm is smooth there and nothing is NaN."""
    leaves = projection_leaves(MemoryRule())
    leaves |= {name: leaves[name].clone() for name in ("k", "q")}
    leaves["k"][:, :, 0] = leaves["q"][:, :, 0] = 0
    got = run_projection(leaves, MemoryRule(), chunk=CHUNK, backend="chunked")
    assert all(bool(t.isfinite().all()) for t in got.values())
    for name in ("k", "q"):
        torch.testing.assert_close(got[name][:, :, 1:].norm(dim=-1), torch.ones(3, 2, 10).double(), atol=1e-5, rtol=0)
    assert (0 <= got["eta"]).all() and (got["eta"] <= 0.8).all()
    assert (got["log_alpha"] <= 0).all() and (got["log_alpha"].exp() >= 0.5 - 1e-12).all()
