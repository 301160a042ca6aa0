"""Reads of a memory in all tiles at once against the same in float64 torch, differentiated by autograd.

States, signals and terms are leaves of their own here: whether they fit together is a matter of the memory scan.
Legend: L rows, T tokens, C tile, NT tiles, K head width, F hidden width.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from hope_kernels.chunk_terms.triton_ import Terms
from hope_kernels.memory import read_memory
from hope_kernels.memory_read.triton_ import Momentum, read_backward, read_forward
from hope_kernels.memory_write.triton_ import Signals, States
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_pt.testing.scans import mismatches

FP32 = 1e-5
BF16 = 5e-3
BF16_GRADIENT = 1.5e-2


@dataclass(frozen=True)
class Case:
    """Sizes and rule of one run; the defaults have a partial tile, a partial chunk and padding."""

    rule: MemoryRule = MemoryRule()
    read: str = "causal"
    rows: int = 2
    tokens: int = 53
    tiling: tuple[int, int] = (24, 16)
    width: int = 24
    hidden: int = 20
    dtype: torch.dtype = torch.float32

    @property
    def tiles(self) -> Tiling:
        return Tiling(tokens=self.tokens, chunk=self.tiling[0], tile=self.tiling[1])


MATRICES = ("w2", "w1", "s2", "s1")
SQUARES = ("m", "n", "m_delta")


def leaves_of(case: Case) -> dict[str, torch.Tensor]:
    """Everything a read sees, float64: what a kernel takes in the operand dtype is rounded to it."""
    generator = torch.Generator().manual_seed(0)
    rows, tile, slots = (case.rows, case.tokens), case.tiling[1], (case.rows, case.tiles.num_tiles + 1)
    inner = case.hidden if case.rule.memory == "mlp" else case.width
    operands = {"q": (*rows, case.width), "residual": (*rows, inner), "m": (*rows, tile), "n": (*rows, tile)}
    matrices = {"w2": (*slots, inner, case.width)}
    if case.rule.memory == "mlp":
        operands |= {"error": (*rows, case.width), "hidden": (*rows, inner)}
        matrices |= {"w1": (*slots, case.width, inner)}
    if case.rule.momentum:
        operands |= {"delta": (*rows, inner), "m_delta": (*rows, tile)}
        matrices |= {name.replace("w", "s"): shape for name, shape in matrices.items()}
    if case.rule.momentum and not case.rule.erases(0):
        del operands["residual"], operands["m"]
    random = lambda shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {name: random(shape).to(case.dtype).double() for name, shape in operands.items()}
    leaves |= {name: (0.4 * random(shape)).to(case.dtype).double() for name, shape in matrices.items()} | {"g": random(rows).sigmoid()}
    if case.rule.momentum:
        leaves["kappa"] = random(rows).sigmoid()
    for name in SQUARES:
        if name in leaves:
            leaves[name] = squares(leaves[name], case.tiles)
    return leaves


def spans(tiling: Tiling) -> list[tuple[int, int, int]]:
    """(anchor slot, first token, end token) of every tile."""
    firsts = [((i // tiling.per_chunk), (i % tiling.per_chunk)) for i in range(tiling.num_tiles)]
    starts = [(c * tiling.per_chunk, c * tiling.chunk + p * tiling.tile, min((c + 1) * tiling.chunk, tiling.tokens)) for c, p in firsts]
    return [(anchor, first, min(first + tiling.tile, end)) for anchor, first, end in starts]


def squares(t: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Lower triangular in every tile, as the terms are: zero where a token would see what is written later."""
    return torch.cat([F.pad(t[:, a:b, : b - a].tril(), (0, tiling.tile - (b - a))) for _, a, b in spans(tiling)], 1)


def twin(leaves: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    outputs = []
    for index, (anchor, first, end) in enumerate(spans(case.tiles)):
        part = {name: t[:, first:end] for name, t in leaves.items() if name not in MATRICES}
        part |= {name: t[..., : end - first] for name, t in part.items() if name in SQUARES}
        slot = anchor if case.read == "anchor" else index
        w2, w1, s2, s1 = (leaves[name][:, slot] if name in leaves else None for name in MATRICES)
        q = part["q"]
        if case.read == "anchor":
            outputs.append(read_memory((w2,) if w1 is None else (w2, w1), q))
            continue
        g = part["g"].unsqueeze(-1)
        z = g * (q @ w2.mT)
        if "m" in part:
            z = z - part["m"] @ part["residual"]
        if s2 is not None:
            z = z + part["kappa"].unsqueeze(-1) * (q @ s2.mT) - part["m_delta"] @ part["delta"]
        if w1 is None:
            outputs.append(z)
            continue
        h = F.silu(z)
        y = q + g * (h @ w1.mT) - (part["n"] * (h @ part["hidden"].mT)) @ part["error"]
        outputs.append(y if s1 is None else y + part["kappa"].unsqueeze(-1) * (h @ s1.mT))
    return torch.cat(outputs, 1)


def by_torch(case: Case) -> dict[str, torch.Tensor]:
    leaves = {name: t.requires_grad_() for name, t in leaves_of(case).items()}
    y = twin(leaves, case)
    found = torch.autograd.grad(y, list(leaves.values()), upstream(case), allow_unused=True)
    gradients = {f"d_{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"y": y.detach()} | {name: squares(g, case.tiles) if name.removeprefix("d_") in SQUARES else g for name, g in gradients.items()}


def upstream(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.rows, case.tokens, case.width, generator=generator, dtype=torch.float64).to(case.dtype).double()


def by_kernel(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    leaves = leaves_of(case)
    operand = lambda name: None if name not in leaves else leaves[name].to(device, case.dtype)  # noqa: E731
    states = States(tuple(operand(name) for name in ("w2", "w1") if name in leaves), ())
    signals = Signals(operand("residual"), operand("error"), operand("hidden"))
    terms = Terms(leaves["g"].to(device, torch.float32), None, None, None, None, operand("m"), operand("n"))
    momentum = None
    if case.rule.momentum:
        slots = tuple(operand(name) for name in ("s2", "s1") if name in leaves)
        momentum = Momentum(slots, operand("delta"), leaves["kappa"].to(device, torch.float32), operand("m_delta"))
    settings = {"rule": case.rule, "tiling": case.tiles, "tiles": range(case.tiles.num_tiles), "read": case.read, "momentum": momentum}
    y = read_forward(operand("q"), states, signals, terms, **settings)
    got = read_backward(upstream(case).to(device, case.dtype), operand("q"), states, signals, terms, **settings)
    found = {"q": got.q, "residual": got.residual, "error": got.error, "hidden": got.hidden}
    found |= dict(zip(("w2", "w1"), got.weights)) | got.terms._asdict()
    if got.momentum is not None:
        slots, *rest = got.momentum
        found |= dict(zip(("s2", "s1"), slots)) | dict(zip(("delta", "kappa", "m_delta"), rest))
    anchors = [anchor if case.read == "anchor" else index for index, (anchor, *_) in enumerate(spans(case.tiles))]
    for name in MATRICES:
        if name in found:  # every tile's share, added to the slot it was read from
            slots = torch.zeros(leaves[name].shape, device=device)
            found[name] = slots.index_add(1, torch.tensor(anchors, device=device), found[name])
    for name in SQUARES:
        if found.get(name) is not None:
            assert found[name].isfinite().all()
            found[name] = squares(found[name], case.tiles)
    outputs = {"y": y} | {f"d_{name}": t for name, t in found.items() if t is not None}
    return {name: t.cpu() for name, t in outputs.items()}


def check(case: Case, device: torch.device) -> None:
    got, wanted = by_kernel(case, device), by_torch(case)
    value, gradient = (FP32, FP32) if case.dtype == torch.float32 else (BF16, BF16_GRADIENT)
    names = {True: {n for n in wanted if n == "y"}, False: {n for n in wanted if n != "y"}}
    assert got.keys() == wanted.keys()
    for is_value, tolerance in ((True, value), (False, gradient)):
        pick = lambda found, is_value=is_value: {n: found[n] for n in names[is_value]}  # noqa: E731
        assert mismatches(pick(got), pick(wanted), tolerance=tolerance) == {}


SHAPES = {
    "padded widths, several tiles a chunk": Case(),
    "whole tiles": Case(tokens=64, tiling=(32, 32), width=32, hidden=32),
    "one token": Case(tokens=1, rows=8),  # the norm of one number alone would measure how its summands cancel
    "less than a tile": Case(tokens=9, rows=1),
    "hidden wider": Case(width=16, hidden=40, tokens=40, tiling=(40, 16)),
    "tile of 64": Case(tokens=70, tiling=(64, 64), width=64, hidden=64, rows=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("read", ["causal", "anchor"])
@pytest.mark.parametrize("memory", ["mlp", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, memory, read, dtype, device):
    check(replace(SHAPES[shape], rule=MemoryRule(memory=memory), read=read, dtype=dtype), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("update", ["dgd", "gd"])
@pytest.mark.parametrize("memory", ["mlp", "linear"])
def test_momentum(memory, update, dtype, device):
    check(Case(rule=MemoryRule(memory=memory, update=update, momentum=True), tokens=29, dtype=dtype), device)


def test_a_run_of_tiles_fills_its_tokens_and_no_other(device):
    case = Case()
    leaves = {name: t.to(device, torch.float32) for name, t in leaves_of(case).items()}
    states, signals = States((leaves["w2"], leaves["w1"]), ()), Signals(leaves["residual"], leaves["error"], leaves["hidden"])
    terms = Terms(leaves["g"], None, None, None, None, leaves["m"], leaves["n"])
    settings = {"rule": case.rule, "tiling": case.tiles, "read": "causal"}
    whole = read_forward(leaves["q"], states, signals, terms, tiles=range(case.tiles.num_tiles), **settings)
    part = read_forward(leaves["q"], states, signals, terms, tiles=range(2, 4), **settings)
    assert torch.equal(part[:, 24:48], whole[:, 24:48])
    assert part[:, :24].isnan().all() and part[:, 48:].isnan().all()
