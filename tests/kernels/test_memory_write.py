"""The writes of a memory, tile after tile, against the same in float64 torch, differentiated by autograd.

Terms of the tiles are leaves of their own here: their kernels have tests of their own. Legend: L rows, S memories a row, R = L * S.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hope_kernels import fused
from hope_kernels.memory import surprise
from hope_kernels.memory_write.triton_ import Signals, States, write_backward, write_forward
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_pt.testing.scans import mismatches

FP32 = 1e-5
BF16 = 5e-3
BF16_GRADIENT = 1.5e-2


@dataclass(frozen=True)
class Case:
    """Sizes, regime and masks of one run; the defaults have partial tiles, partial chunks, padding and shared keys."""

    rule: MemoryRule = MemoryRule()
    rows: int = 1
    memories: int = 2
    tokens: int = 21
    chunk: int = 16
    tile: int = 16
    width: int = 12
    hidden: int = 20
    keys: str = "random"
    retention: str = "mixed"
    masked: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def tiling(self) -> Tiling:
        return Tiling(tokens=self.tokens, chunk=self.chunk, tile=self.tile)


def spans(tiling: Tiling) -> list[tuple[int, int, int, int, bool]]:
    """(chunk, anchor slot, first token, end token, whether it is the last of its chunk) of every tile."""
    found = []
    for chunk in range(tiling.num_chunks):
        end = min((chunk + 1) * tiling.chunk, tiling.tokens)
        starts = range(chunk * tiling.chunk, end, tiling.tile)
        found += [(chunk, chunk * tiling.per_chunk, first, min(first + tiling.tile, end), first == starts[-1]) for first in starts]
    return found


def tile_terms(k: torch.Tensor, eta: torch.Tensor, log_alpha: torch.Tensor, *, rule: MemoryRule, tiling: Tiling) -> dict[str, torch.Tensor]:
    """y [L, T, K], w, g_prev [L, T] and g_end [L, NT] of every tile."""
    parts = [fused.terms(k[:, a:b], None, eta[:, a:b], log_alpha[:, a:b], erase=rule.erases(0)) for _, _, a, b, _ in spans(tiling)]
    joined = {name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("y", "w", "g_prev", "g_end")}
    return {name: t if name == "y" else t.squeeze(-1) for name, t in joined.items()}


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def leaves_of(case: Case) -> dict[str, torch.Tensor]:
    """k, v, the terms of the tiles, carried state and start, in float64, rounded to bf16 where the case's operands are."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shape = (case.rows, case.tokens, case.width)
    shared, own = unit(random(case.rows, 1, case.width)), unit(random(*shape))
    mixtures = {"random": own, "correlated": unit(shared + 0.176 * own), "identical": shared.expand(shape).clone()}
    k, v = mixtures[case.keys].to(case.dtype).double(), random(*shape).to(case.dtype).double()
    eta = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    eta[:, ::3] = 1.0
    log_alpha = -torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    if case.retention != "mixed":
        log_alpha[:, ::2] = -20.0 if case.retention == "zero" else 0.0
    leaves = {"k": k, "v": v} | tile_terms(k, eta, log_alpha, rule=case.rule, tiling=case.tiling)
    leaves["y"] = leaves["y"].to(case.dtype).double()
    memories = case.rows * case.memories
    shapes = [(case.hidden, case.width), (case.width, case.hidden)] if case.rule.memory == "mlp" else [(case.width, case.width)]
    for name in ("state", "start"):
        leaves |= {f"{name}.{i}": 0.4 * random(memories, *shape) for i, shape in enumerate(shapes)}
    return leaves


def masks_of(case: Case) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """commit and reset [L, N]."""
    if not case.masked:
        return None, None
    generator = torch.Generator().manual_seed(3)
    shape = (case.rows, case.tiling.num_chunks)
    return torch.rand(shape, generator=generator) > 0.4, torch.rand(shape, generator=generator) > 0.5


def pick(leaves: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, ...]:
    return tuple(t for name, t in leaves.items() if name.startswith(prefix))


def twin(leaves: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """Signals and slots by plain torch, tile after tile: the specification, differentiable by autograd."""
    rule, (commit, reset) = case.rule, masks_of(case)
    k, v, y, w, g_prev, g_end = (leaves[n].repeat_interleave(case.memories, 0) for n in ("k", "v", "y", "w", "g_prev", "g_end"))
    weights = pick(leaves, "state")
    slots, signals = [], []
    for index, (chunk, anchor_slot, first, end, is_last) in enumerate(spans(case.tiling)):
        at = slice(first, end)
        if index == anchor_slot:
            if reset is not None:
                weights = choose(reset[:, chunk], pick(leaves, "start"), weights, case)
            anchor = weights
        slots.append(weights)
        layers = surprise(anchor, k[:, at], v[:, at], rule)
        residual = layers[0].delta
        if rule.erases(0):
            residual = residual + g_prev[:, at, None] * (k[:, at] @ weights[0].mT)
        kept = g_end[:, index, None, None]
        after: tuple[torch.Tensor, ...] = (kept * weights[0] - residual.mT @ y[:, at],)
        found = {"residual": residual}
        if rule.memory == "mlp":
            found |= {"error": layers[1].delta, "hidden": layers[1].x}
            after += (kept * weights[1] - (w[:, at, None] * found["error"]).mT @ found["hidden"],)
        signals.append(found)
        weights = choose(commit[:, chunk], after, anchor, case) if commit is not None and is_last else after
    slots.append(weights)
    outputs = {f"states.{i}": torch.stack(each, 1) for i, each in enumerate(zip(*slots, strict=True))}
    return outputs | {name: torch.cat([s[name] for s in signals], 1) for name in signals[0]}


def choose(rows: torch.Tensor, where: tuple, otherwise: tuple, case: Case) -> tuple:
    return fused.choose(rows.repeat_interleave(case.memories, 0), where, otherwise)


def arguments(leaves: dict[str, torch.Tensor], case: Case, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """What both launches take: (k, v, terms, states, signals), and the keywords."""
    low = {name: leaves[name].to(device, case.dtype) for name in ("k", "v", "y")}
    gates = {name: leaves[name].to(device, torch.float32) for name in ("w", "g_prev", "g_end")}
    memories, tiling = case.rows * case.memories, case.tiling
    current = tuple(t.to(device, torch.float32).clone() for t in pick(leaves, "state"))
    states = States.at(current, tiles=tiling.num_tiles, dtype=case.dtype, backward=True)
    signals = Signals.empty(case.rule, memories, tokens=case.tokens, width=case.width, hidden=case.hidden, dtype=case.dtype, device=device)
    commit, reset = (None if m is None else m.to(device, torch.uint8) for m in masks_of(case))
    start = tuple(t.to(device, torch.float32) for t in pick(leaves, "start")) if case.masked else ()
    keywords = {"rule": case.rule, "tiling": tiling, "tiles": range(tiling.num_tiles), "commit": commit, "reset": reset, "start": start}
    return (low["k"], low["v"], SimpleNamespace(y=low["y"], **gates), states, signals), keywords


def written(states: States, signals: Signals) -> dict[str, torch.Tensor]:
    found = {
        f"states.{i}": torch.cat([t[:, :-1], c.unsqueeze(1)], 1)
        for i, (t, c) in enumerate(zip(states.weights, states.current, strict=True))
    }
    return found | {n: getattr(signals, n) for n in ("residual", "error", "hidden") if getattr(signals, n) is not None}


LINEAR = MemoryRule(memory="linear")
CASES = {
    "partial tile": Case(),
    "one token, one memory": Case(tokens=1, memories=1),
    "several tiles a chunk": Case(tokens=75, chunk=40),
    "chunk below a tile": Case(tokens=13, chunk=8, width=16, hidden=16),
    "masked": Case(rows=3, memories=1, tokens=40, masked=True),
    "masked, several tiles a chunk": Case(rows=2, tokens=56, chunk=24, masked=True),
    "correlated keys, alpha near 0": Case(keys="correlated", retention="zero", width=24),
    "identical keys, alpha 1": Case(keys="identical", retention="one", width=24),
    "l2, unit targets": Case(rule=MemoryRule(objective="l2", normalize_v=True), tokens=16),
    "given targets of unit length": Case(rule=MemoryRule(self_target=False, normalize_v=True)),
    "gd, given targets, several tiles a chunk": Case(rule=MemoryRule(update="gd", self_target=False), tokens=40, chunk=32),
    "linear": Case(rule=LINEAR, width=20),
    "linear, masked, several tiles a chunk": Case(rule=LINEAR, rows=2, tokens=75, chunk=24, masked=True),
    "linear gd, given unit targets": Case(rule=MemoryRule(memory="linear", update="gd", self_target=False, normalize_v=True)),
    "linear l2, unit targets": Case(rule=MemoryRule(memory="linear", objective="l2", normalize_v=True), tokens=16),
}


def of_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, dtype=dtype)


def cotangents(outputs: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the end state, of the signals and, as "reads.i" [R, NT, ...], of the states through the reads."""
    generator = torch.Generator().manual_seed(2)
    random = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in outputs.items()}
    given = {n: t for n, t in random.items() if not n.startswith("states")}
    for name in random.keys() - given.keys():
        given |= {f"end{name[6:]}": random[name][:, -1], f"reads{name[6:]}": random[name][:, :-1].contiguous()}
    return dict(sorted(given.items()))


def autograd(leaves: dict[str, torch.Tensor], case: Case, read: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(cotangents, gradients of the leaves) of the twin."""
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    outputs = twin(leaves, case)
    given = cotangents(outputs, case)
    seen = [anchor if read == "anchor" else i for i, (_, anchor, *_) in enumerate(spans(case.tiling))]
    pairs = [(t, given[name]) for name, t in outputs.items() if name in given]
    for name in outputs.keys() - given.keys():
        pairs += [(outputs[name][:, seen], given[f"reads{name[6:]}"]), (outputs[name][:, -1], given[f"end{name[6:]}"])]
    found = torch.autograd.grad([t for t, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return given, {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def kernels(
    leaves: dict[str, torch.Tensor], case: Case, given: dict[str, torch.Tensor], read: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """The same gradients by both kernels."""
    positional, keywords = arguments(leaves, case, device)
    write_forward(*positional, **keywords)
    given = {name: t.to(device, torch.float32) for name, t in given.items()}
    del keywords["start"]
    d_signals = Signals(**{name: t for name, t in given.items() if name in ("residual", "error", "hidden")})
    k, v, terms, states, signals = positional
    found = write_backward(
        k, v, terms, states, signals, pick(given, "end"), d_signals=d_signals, d_reads=pick(given, "reads"), read=read, **keywords
    )
    total = lambda t, name: torch.zeros(leaves[name].shape) if t is None else t.unflatten(0, (case.rows, -1)).sum(1)  # noqa: E731
    gradients = {f"d{name}": total(getattr(found, name), name) for name in ("k", "v", "y", "w", "g_prev", "g_end")}
    gradients |= {f"dstate.{i}": t for i, t in enumerate(found.current)}
    return gradients | {f"dstart.{i}": t for i, t in enumerate(found.start or [torch.zeros_like(t) for t in found.current])}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward(case, dtype, device):
    case = of_dtype(case, dtype)
    leaves = leaves_of(case)
    positional, keywords = arguments(leaves, case, device)
    write_forward(*positional, **keywords)
    assert not mismatches(written(*positional[3:]), twin(leaves, case), tolerance=FP32 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_backward(case, dtype, device):
    case = of_dtype(case, dtype)
    read = "anchor" if case.chunk > case.tile and case.masked else "causal"
    leaves = leaves_of(case)
    given, wanted = autograd(leaves, case, read)
    assert not mismatches(kernels(leaves, case, given, read, device), wanted, tolerance=FP32 if dtype == torch.float32 else BF16_GRADIENT)


def test_windows_of_tiles_continue_each_other(device):
    case = Case(tokens=75, chunk=24)
    leaves = leaves_of(case)
    whole, keywords = arguments(leaves, case, device)
    write_forward(*whole, **keywords)
    parts, _ = arguments(leaves, case, device)
    for tiles in (range(0, 4), range(4, case.tiling.num_tiles)):
        write_forward(*parts, **keywords | {"tiles": tiles})
    assert not mismatches(written(*parts[3:]), written(*whole[3:]), tolerance=0.0)


def test_tiles_of_a_chunk_write_what_the_chunk_writes(device):
    one, many = Case(tokens=32, chunk=32, tile=32), Case(tokens=32, chunk=32, tile=16)
    ends = []
    for case in (one, many):
        positional, keywords = arguments(leaves_of(case), case, device)
        write_forward(*positional, **keywords)
        ends.append({f"end.{i}": t for i, t in enumerate(positional[3].current)})
    assert not mismatches(ends[1], ends[0], tolerance=FP32)
