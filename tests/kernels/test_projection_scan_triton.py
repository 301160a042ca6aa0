"""The projection scan of Triton kernels against the token recurrence in float64: generated streams, end states and every gradient."""

from dataclasses import replace

import pytest
import torch

from hope_kernels.projection_scan import BACKENDS, Generated, Inputs, Readout
from hope_kernels.projection_scan.chunked import write_chunk
from hope_kernels.projection_scan.triton_ import scan
from hope_kernels.rule import ChunkMasks, MemoryRule
from hope_pt.testing.scans import (
    Size,
    mismatches,
    projection_leaves,
    random_like_keys,
    random_masks,
    run_projection,
    states,
    with_gradients,
)

FP32 = 1e-5
"""2^-24 times the roundings of a few chunks."""
BF16_VALUES, BF16_GRADIENTS = 5e-3, 1.5e-2
"""2^-9 for every operand of a product and every result, and a gradient passes through more of them."""
SMALL = Size(batch=1, heads=1, tokens=27, width=12, hidden=15)
STREAMS = ("k", "v", "q", "eta", "log_alpha")
STACKS = {"default": ("k", "eta", "alpha", "v"), "all": ("q", "v", "alpha", "k", "eta"), "one": ("v",)}


def leaves_of(rule: MemoryRule, size: Size, *, stack: tuple[str, ...] = STACKS["default"], keys: str = "") -> dict[str, torch.Tensor]:
    """Leaves in fp32 values; keys: streams k and v of that likeness, which the memories of a chunk keep."""
    leaves = {name: t.float() for name, t in projection_leaves(rule, stack=stack, size=size).items()}
    if keys:
        generator = torch.Generator().manual_seed(1)
        leaves["k"], leaves["v"] = (random_like_keys(keys, size, generator, torch.float32) for _ in range(2))
    return leaves


def check(leaves: dict[str, torch.Tensor], rule: MemoryRule, *, chunk: int, device: torch.device, **settings) -> None:
    """Both runs, compared; settings of `run_projection`."""
    wanted = run_projection({n: t.double() for n, t in leaves.items()}, rule, chunk=chunk, backend="reference", **settings)
    if "live" in settings:
        settings["live"] = settings["live"].to(device)
    if "masks" in settings:
        settings["masks"] = ChunkMasks(settings["masks"].commit_BN.to(device), settings["masks"].reset_BN.to(device))
    got = run_projection({n: t.to(device) for n, t in leaves.items()}, rule, chunk=chunk, backend="triton", **settings)
    compare({n: t.cpu() for n, t in got.items()}, wanted, leaves["k"].dtype)


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Relative errors of all tensors."""
    values, gradients = (FP32, FP32) if dtype == torch.float32 else (BF16_VALUES, BF16_GRADIENTS)
    for tolerance, names in ((gradients, leaf_names(wanted)), (values, wanted.keys() - leaf_names(wanted))):
        assert not mismatches({n: got[n] for n in names}, {n: wanted[n] for n in names}, tolerance=tolerance)


def leaf_names(results: dict[str, torch.Tensor]) -> set[str]:
    """The gradients among the results of a run."""
    return {name for name in results if name.startswith("d")}


RULES = {
    "default": MemoryRule(),
    "l2_unit_values": MemoryRule(objective="l2", normalize_v=True),
    "gd_given_target": MemoryRule(update="gd", self_target=False),
    "linear": MemoryRule(memory="linear"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, device):
    """Two tiles a chunk, two segments, a partial chunk and tile, padding, a carried state."""
    check(leaves_of(RULES[rule], SMALL), RULES[rule], chunk=18, device=device, save_every=18)


def test_masks(device):
    """Rows that skip commits, return to the start, or both, at the first and at later chunks, in two segments."""
    size = replace(SMALL, batch=2, tokens=52)
    masks = ChunkMasks(torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]) > 0, torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]) > 0)
    leaves = leaves_of(RULES["default"], size, stack=("k", "alpha"))
    check(leaves, RULES["default"], chunk=16, device=device, stack=("k", "alpha"), masks=masks, save_every=32)


@pytest.mark.parametrize("stack", ["all", "one"])
def test_stacks(stack, device):
    """Any streams may have memories; several heads, positions that are no-ops."""
    size = replace(SMALL, heads=2)
    live = (torch.arange(size.tokens) % 5 > 0).float().expand(1, 1, -1)
    leaves = leaves_of(RULES["default"], size, stack=STACKS[stack])
    check(leaves, RULES["default"], chunk=16, device=device, stack=STACKS[stack], live=live)


@pytest.mark.parametrize("switches", [{}, {"writes": False}, {"retention": False}], ids=["on", "no_writes", "no_retention"])
def test_empty_stack(switches, device):
    """Nothing but unit length and gates."""
    check(leaves_of(RULES["default"], SMALL, stack=()), RULES["default"], chunk=16, device=device, stack=(), **switches)


@pytest.mark.parametrize("keys", ["correlated", "identical"])
def test_like_keys(keys, device):
    """Keys of cosine near 0.97 and the same key in all tokens of a chunk."""
    size = replace(SMALL, tokens=33)
    check(leaves_of(RULES["default"], size, keys=keys), RULES["default"], chunk=32, device=device)


@pytest.mark.parametrize("tokens", [1, 7])
def test_short(tokens, device):
    """One token, and fewer than a tile."""
    size = replace(SMALL, tokens=tokens, heads=2)
    check(leaves_of(RULES["default"], size), RULES["default"], chunk=16, device=device)


@pytest.mark.parametrize("rule", ["default", "linear"])
def test_bf16(rule, device):
    """Streams in bf16, states, gates and readout in fp32; the reference has the same rounded streams and anchors.

    The end states are those of exact writes of the k and v that the op returned: two rounded generated tensors alone move them by 5e-3.
    """
    rule, size = RULES[rule], Size(batch=1, heads=1, tokens=40, width=24, hidden=20)
    leaves = leaves_of(rule, size)
    leaves |= {name: leaves[name].bfloat16() for name in ("k", "v", "q")}
    leaves |= {name: (0.5 * leaves[name]).bfloat16().float() for name in leaves if name.startswith("state.")}
    wanted = run_projection({n: t.double() for n, t in leaves.items()}, rule, chunk=32, backend="reference")
    got = run_projection({n: t.to(device) for n, t in leaves.items()}, rule, chunk=32, backend="triton")
    got = {n: t.cpu() for n, t in got.items()}
    state, _ = states({n: t.double() for n, t in leaves.items()}, rule)
    for first in (0, 32):
        here = Generated(*(got[n][:, :, first : first + 32].double() for n in STREAMS))
        state = write_chunk(state, here, None, rule=rule)
    compare(got, wanted | {f"end.{i}": t for i, t in enumerate(state.tensors())}, torch.bfloat16)


def test_state_not_kept(device):
    """Without the state at the end the last chunk is not written, and every gradient is that of the streams alone."""
    rule, results = RULES["default"], []
    size = SMALL
    for backend, dtype in (("chunked", torch.float64), ("triton", torch.float32)):
        leaves = {n: t.to(device, dtype).requires_grad_() for n, t in leaves_of(rule, size).items()}
        state, start = states(leaves, rule)
        generated, end = BACKENDS[backend](
            Inputs(leaves["k"], leaves["v"], leaves["q"]), Readout(*(leaves[f"readout.{i}"] for i in range(4))), state, rule=rule,
            stack=STACKS["default"], chunk=16, start=start, masks=ChunkMasks(), save_every=16, keep_state=False,
        )  # fmt: skip
        assert end is None
        outputs = dict(zip(STREAMS, generated.tensors(), strict=True))
        results.append({name: t.cpu() for name, t in with_gradients(outputs, leaves).items()})
    compare(results[1], results[0], torch.float32)


def test_operator(device):
    """Schema, fake implementation, autograd registration and tracing with any length."""
    rule, size = RULES["default"], Size(1, 1, 20, 8, 8)
    leaves = {n: t.to(device).requires_grad_() for n, t in leaves_of(rule, size).items()}
    state, start = states(leaves, rule)
    masks = random_masks(size, 16)
    arguments = (
        [leaves[n].flatten(0, 1) for n in ("k", "v", "q")], None, [leaves[f"readout.{i}"] for i in range(4)], list(state.weights),
        list(start.weights), masks.commit_BN.to(device), masks.reset_BN.to(device), rule.memory, rule.objective, rule.huber_delta,
        rule.update, rule.self_target, rule.normalize_v, ",".join(STACKS["default"]), 16, 16, True, 1.0, True, True,
    )  # fmt: skip
    torch.library.opcheck(
        scan, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_what_is_not_supported():
    """Says why."""
    with pytest.raises(ValueError, match="float64"):
        run_projection(projection_leaves(MemoryRule(), size=SMALL), MemoryRule(), chunk=16, backend="triton")
