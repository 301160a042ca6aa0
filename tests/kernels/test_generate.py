"""The kernels that generate k, v, q, eta and log alpha, against the plain-torch chunk in float64: values and every gradient."""

from collections.abc import Iterator

import pytest
import torch

from hope_kernels.projection_scan.chunked import generate_chunk
from hope_kernels.projection_scan.generate import SOURCE, Generated, Readout, generate
from hope_kernels.projection_scan.generate_triton import STREAMS, Anchors, Inner, empty_streams, generate_backward, generate_forward
from hope_kernels.rule import MemoryRule, MemoryState
from hope_kernels.tiling import Tiling
from hope_pt.testing.scans import mismatches

BATCH, HEADS = 2, 1
ROWS = BATCH * HEADS
FP32 = 1e-5
"""2^-24 times the roundings of a few products of width 64."""
BF16_VALUES, BF16_GRADIENTS = 5e-3, 1.5e-2
"""2^-9 for every operand of a product and every result, and a gradient passes through more of them."""
NAMES = ("k", "v", "q", "eta", "log_alpha")


def case(
    rule: MemoryRule, stack: tuple[str, ...], tiling: Tiling, width: int, hidden: int, *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Leaves: streams, readout, anchors w.i [L * S, NT + 1, ...], start.i, live, upstream u.*, gradients through the writes i.*."""
    generator = torch.Generator().manual_seed(tiling.tokens + len(stack))
    rounded = {"k", "v", "q", "u.k", "u.v", "u.q"}
    vector, scalar, slots = (ROWS, tiling.tokens, width), (ROWS, tiling.tokens), (ROWS * len(stack), tiling.num_tiles + 1)
    shapes = {**dict.fromkeys(("k", "v", "q", "u.k", "u.v", "u.q", "i.terms_k"), vector)}
    shapes |= dict.fromkeys(("u.eta", "u.log_alpha", "i.eta", "i.log_alpha"), scalar)
    shapes |= dict.fromkeys(("i.k", "i.v"), (max(1, len(stack)) * ROWS, *vector[1:]))
    shapes |= {f"readout.{i}": (HEADS, width) if i % 2 == 0 else (HEADS,) for i in range(4)}
    if stack:
        layers = [(hidden, width), (width, hidden)] if rule.memory == "mlp" else [(width, width)]
        shapes |= {f"w.{i}": (*slots, *layer) for i, layer in enumerate(layers)}
        shapes |= {f"start.{i}": (slots[0], *layer) for i, layer in enumerate(layers)}
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves = {name: t * 0.3 if name.startswith(("w.", "start.")) else t for name, t in leaves.items()}
    leaves = {name: t.to(dtype) if name in rounded or name.startswith(("w.", "start.")) else t for name, t in leaves.items()}
    leaves["readout.0"] *= 0.3
    leaves["readout.2"] *= 0.3
    leaves["readout.3"] -= 2.0  # both sides of the bound alpha >= 1/2
    leaves["live"] = (torch.rand(BATCH, tiling.tokens, generator=generator) > 0.2).float()
    leaves["reset"] = (torch.rand(ROWS, tiling.num_chunks, generator=generator) > 0.5).to(torch.uint8)
    return leaves


def chunks(tiling: Tiling) -> Iterator[tuple[int, range, slice]]:
    """Number, tiles and tokens of every chunk."""
    for n in range(tiling.num_chunks):
        yield n, tiling.tiles_of(range(n, n + 1)), slice(n * tiling.chunk, min((n + 1) * tiling.chunk, tiling.tokens))


def by_memory(t: torch.Tensor) -> torch.Tensor:
    """[L * S, ...] -> [B, H, S, ...]."""
    return t.unflatten(0, (BATCH, HEADS, -1))


def twin(
    leaves: dict[str, torch.Tensor], rule: MemoryRule, stack: tuple[str, ...], tiling: Tiling, switches: dict
) -> dict[str, torch.Tensor]:
    """Values and gradients by autograd in float64."""
    leaves = {name: t.double() for name, t in leaves.items()}
    wanted = [name for name in leaves if name in ("k", "v", "q") or name.startswith(("readout", "w.", "start."))]
    for name in wanted:
        leaves[name].requires_grad_()
    readout = Readout(*(leaves[f"readout.{i}"] for i in range(4)), **switches)
    parts = []
    for n, tiles, tokens in chunks(tiling):
        streams = {name: leaves[name].unflatten(0, (BATCH, HEADS))[:, :, tokens] for name in ("k", "v", "q")}
        live = leaves["live"][:, None, tokens]
        if not stack:
            reads = {name: streams[source] for name, source in SOURCE.items()}
            parts.append(generate(reads, readout, live=live, normalize_v=rule.normalize_v))
            continue
        slots = [by_memory(leaves[f"w.{i}"][:, tiles.start]) for i in range(rule.num_layers)]
        starts = [by_memory(leaves[f"start.{i}"]) for i in range(rule.num_layers)]
        state = MemoryState(tuple(slots)).where(leaves["reset"][::HEADS, n] != 0, MemoryState(tuple(starts)))
        parts.append(generate_chunk(state, streams, readout, live=live, stack=stack, rule=rule))
    generated = Generated(*(torch.cat(each, 2).flatten(0, 1) for each in zip(*(p.tensors() for p in parts), strict=True)))
    sums = {name: leaves[f"i.{name}"] for name in ("terms_k", "eta", "log_alpha")}
    sums |= {name: leaves[f"i.{name}"].unflatten(0, (ROWS, -1)).sum(1) for name in ("k", "v")}
    inner = {"k": sums["k"] + sums["terms_k"], "v": sums["v"], "q": 0, "eta": sums["eta"], "log_alpha": sums["log_alpha"]}
    pairs = [(t, leaves[f"u.{name}"] + inner[name]) for name, t in zip(NAMES, generated.tensors(), strict=True) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs], allow_unused=True)
    zero_or = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(wanted, found, strict=True)}
    return {**dict(zip(NAMES, (t.detach() for t in generated.tensors()), strict=True)), **{f"d{name}": g for name, g in zero_or.items()}}


def kernels(
    leaves: dict[str, torch.Tensor], rule: MemoryRule, stack: tuple[str, ...], tiling: Tiling, switches: dict
) -> dict[str, torch.Tensor]:
    """The same from the kernels: the stack chunk by chunk, the static streams in runs of two tiles."""
    readout = Readout(*(leaves[f"readout.{i}"] for i in range(4)), **switches)
    streams = tuple(leaves[name] for name in ("k", "v", "q"))
    weights, start = (tuple(leaves[f"{name}.{i}"] for i in range(rule.num_layers)) if stack else () for name in ("w", "start"))
    static, stacked = Anchors(tuple(n for n in STREAMS if n not in stack)), Anchors(stack, weights, start, leaves["reset"])
    settings = {"normalize_v": rule.normalize_v, "tiling": tiling}
    every, run = range(tiling.num_tiles), 2
    out = empty_streams(leaves["k"])
    if static.names:
        generate_forward(streams, leaves["live"], static, readout, chunks=range(tiling.num_chunks), out=out, **settings)
    for n in range(tiling.num_chunks) if stack else ():
        generate_forward(streams, leaves["live"], stacked, readout, chunks=range(n, n + 1), out=out, **settings)
    inner = Inner(*(leaves[f"i.{name}"] for name in Inner._fields))
    upstream = tuple(leaves[f"u.{name}"] for name in NAMES)
    device = leaves["k"].device
    d_x = torch.empty(len(STREAMS), *leaves["k"].shape, device=device)
    d_weights, d_start = ([torch.zeros(w.shape, device=w.device) for w in of] for of in (weights, start))
    runs = -(-tiling.num_tiles // run)
    shape = (leaves["k"].shape[2],)
    sums = [tuple(torch.zeros(2, ROWS, r, *more, device=device) for more in (shape, ())) for r in (runs, 1)]
    settings |= {"d_x": d_x, "d_start": tuple(d_start)}
    if static.names:
        generate_backward(
            upstream, inner, streams, static, readout, out, tiles=every, run=run, d_weights=(), d_readout=sums[0][0], d_bias=sums[0][1],
            **settings,
        )  # fmt: skip
    for _, tiles, _ in chunks(tiling) if stack else ():
        adjoint = tuple(torch.zeros(w[:, 0].shape, device=device) for w in weights)
        generate_backward(
            upstream, inner, streams, stacked, readout, out, tiles=tiles, run=len(tiles), d_weights=adjoint, d_readout=sums[1][0],
            d_bias=sums[1][1], **settings,
        )  # fmt: skip
        for whole, part in zip(d_weights, adjoint, strict=True):
            whole[:, tiles.start] = part
    d_readout, d_bias = ((a.sum(2) + b.sum(2)).unflatten(1, (BATCH, HEADS)).sum(1) for a, b in zip(*sums, strict=True))
    gradients = {"k": d_x[:3].sum(0), "v": d_x[3], "q": d_x[4]}
    gradients |= {"readout.0": d_readout[0], "readout.1": d_bias[0], "readout.2": d_readout[1], "readout.3": d_bias[1]}
    gradients |= {f"w.{i}": w for i, w in enumerate(d_weights)} | {f"start.{i}": w for i, w in enumerate(d_start)}
    return {**dict(zip(NAMES, out, strict=False)), **{f"d{name}": g for name, g in gradients.items()}}


def check(
    rule: MemoryRule, stack: tuple[str, ...], tiling: Tiling, width: int, hidden: int, *, device, dtype=torch.float32, **switches
) -> None:
    """Both, compared; switches of Readout."""
    leaves = case(rule, stack, tiling, width, hidden, dtype=dtype)
    switches = {"eta_max": 0.8, **switches}
    wanted = twin(leaves, rule, stack, tiling, switches)
    got = kernels({name: t.to(device) for name, t in leaves.items()}, rule, stack, tiling, switches)
    got = {name: t.cpu() for name, t in got.items()}
    assert got["k"].dtype == dtype and got["eta"].dtype == torch.float32
    if dtype == torch.float32:
        assert not mismatches(got, wanted, tolerance=FP32)
        return
    values, gradients = ({n: t for n, t in wanted.items() if n.startswith("d") is is_d} for is_d in (False, True))
    assert not mismatches({n: got[n] for n in values}, values, tolerance=BF16_VALUES)
    assert not mismatches({n: got[n] for n in gradients}, gradients, tolerance=BF16_GRADIENTS)


STACKS = {
    "default": ("k", "eta", "alpha", "v"),
    "all": ("q", "v", "alpha", "k", "eta"),
    "gates": ("alpha", "eta"),
    "v": ("v",),
    "static": (),
}


@pytest.mark.parametrize("memory", ["mlp", "linear"])
@pytest.mark.parametrize("stack", STACKS)
def test_every_stack(memory, stack, device):
    """Any streams may have memories; one chunk of three tiles and a partial one, widths that fill no block."""
    check(MemoryRule(memory=memory), STACKS[stack], Tiling(53, 40, 16), 24, 20 if memory == "mlp" else 24, device=device)


@pytest.mark.parametrize("stack", ["default", "static"])
@pytest.mark.parametrize("switches", [{"writes": False}, {"retention": False}], ids=["no_writes", "no_retention"])
def test_control_switches(stack, switches, device):
    """eta = 0 and alpha = 1, or alpha = 1: exactly, and no gradient reaches what made them."""
    check(MemoryRule(normalize_v=True), STACKS[stack], Tiling(20, 16, 16), 16, 16, device=device, **switches)


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_normalised_values(tokens, device):
    """v of unit length; one token, one tile, three."""
    check(MemoryRule(normalize_v=True), STACKS["all"], Tiling(tokens, 32, 16), 16, 32, device=device)


@pytest.mark.parametrize("memory", ["mlp", "linear"])
def test_bf16(memory, device):
    """Operands and vectors in bf16, gates and weight gradients in fp32."""
    check(MemoryRule(memory=memory, normalize_v=True), STACKS["all"], Tiling(100, 64, 32), 64, 64, device=device, dtype=torch.bfloat16)
