"""The memory scan with momentum in Triton against the token recurrence in float64: values, end states and every gradient."""

from dataclasses import dataclass, replace

import pytest
import torch

from hope_kernels.memory_scan import triton_
from hope_kernels.rule import ChunkMasks, MemoryRule
from hope_pt.testing.scans import Size, memory_leaves, mismatches, random_masks, run_memory

FP32 = 1e-5
BF16 = 5e-3
BF16_STATE = 1e-2
"""As without momentum: the error signals of a chunk are those of its anchor rounded to bf16, and that alone moves end states by 5e-3."""
BF16_GRADIENT = 1.5e-2
OPERANDS = ("q", "k", "v")
TITANS = MemoryRule(momentum=True)


@dataclass(frozen=True)
class Case:
    """One scan; the defaults have padded widths, a carried state and momentum, a partial last chunk and two segments."""

    rule: MemoryRule = TITANS
    size: Size = Size(batch=1, heads=1, tokens=27, width=12, hidden=20)
    chunk: int = 16
    read: str = "causal"
    keys: str = "random"
    retention: str = "mixed"
    eta_max: float = 0.6
    masked: bool = False
    save_every: int = 16

    @property
    def masks(self) -> ChunkMasks:
        return random_masks(self.size, self.chunk) if self.masked else ChunkMasks()

    def leaves(self) -> dict[str, torch.Tensor]:
        return memory_leaves(self.rule, size=self.size, keys=self.keys, retention=self.retention, eta_max=self.eta_max)


SHAPE = Case().size
CASES = {
    "random keys, two heads": Case(size=replace(SHAPE, heads=2)),
    "correlated keys, memory lost": Case(keys="correlated", retention="zero"),
    "identical keys, nothing lost": Case(keys="identical", retention="one"),
    "chunk shorter than a tile": Case(chunk=5, size=replace(SHAPE, tokens=13), save_every=10),
    "several tiles a chunk": Case(chunk=40, size=replace(SHAPE, tokens=61), save_every=40),
    "several tiles a chunk, masked": Case(chunk=20, size=replace(SHAPE, batch=2, tokens=43), save_every=20, masked=True),
    "one token": Case(size=Size(batch=1, heads=1, tokens=1, width=16, hidden=16)),
    "masked": Case(size=replace(SHAPE, batch=2), chunk=8, masked=True),
    "anchor": Case(read="anchor"),
    "anchor, several tiles a chunk, masked": Case(read="anchor", chunk=24, size=replace(SHAPE, batch=3), save_every=24, masked=True),
    "gd": Case(rule=replace(TITANS, update="gd", huber_delta=0.5), chunk=20, save_every=20),
    "l2, v as it is": Case(rule=replace(TITANS, objective="l2", self_target=False), eta_max=0.1),
    "unit v": Case(rule=replace(TITANS, normalize_v=True)),
    "v of unit length as it is": Case(rule=replace(TITANS, normalize_v=True, self_target=False)),
    "linear": Case(rule=replace(TITANS, memory="linear"), chunk=20, save_every=20),
    "linear, gd, unit v, masked": Case(
        rule=replace(TITANS, memory="linear", update="gd", normalize_v=True), size=replace(SHAPE, batch=2), masked=True
    ),
    "linear, v as it is": Case(rule=replace(TITANS, memory="linear", self_target=False)),
}


def moved(masks: ChunkMasks, device: torch.device) -> ChunkMasks:
    return ChunkMasks(*(None if m is None else m.to(device) for m in (masks.commit_BN, masks.reset_BN)))


def runs() -> list[tuple[str, torch.dtype]]:
    """Every case in fp32, and in bf16 those in which no gradient of a gate is so small a sum of large terms that rounding is most of it."""
    cancels = ("chunk shorter than a tile", "several tiles a chunk", "one token")
    return [(name, torch.float32) for name in CASES] + [(name, torch.bfloat16) for name in CASES if name not in cancels]


@pytest.mark.parametrize(("name", "dtype"), runs(), ids=lambda value: str(value).removeprefix("torch."))
def test_against_the_recurrence(name, dtype, device):
    case = CASES[name]
    low = {name: t.to(device, dtype if name in OPERANDS else torch.float32) for name, t in case.leaves().items()}
    exact = {name: t.cpu().double() for name, t in low.items()}
    wanted = run_memory(exact, case.rule, masks=case.masks, chunk=case.chunk, read=case.read, backend="reference")
    got = run_memory(
        low, case.rule, masks=moved(case.masks, device), chunk=case.chunk, read=case.read, backend="triton", save_every=case.save_every
    )
    assert {got[name].dtype for name in ("y", "dq", "dk", "dv")} == {dtype} and got["dlog_mu"].dtype == torch.float32
    assert got.keys() == wanted.keys()
    for kind, bf16 in {"y": BF16, "end": BF16_STATE, "d": BF16_GRADIENT}.items():
        first, second = ({n: t.cpu() for n, t in found.items() if n.startswith(kind)} for found in (got, wanted))
        assert mismatches(first, second, tolerance=FP32 if dtype == torch.float32 else bf16) == {}


def test_results_depend_neither_on_tiles_nor_on_segments(device, monkeypatch):
    case = Case(chunk=24, size=replace(SHAPE, tokens=37))
    leaves = {name: t.to(device, torch.float32) for name, t in case.leaves().items()}
    run = lambda save_every: run_memory(leaves, case.rule, chunk=24, backend="triton", save_every=save_every)  # noqa: E731
    few = run(1000)
    assert mismatches(run(24), few, tolerance=FP32) == {}
    forward = triton_.memory_scan
    monkeypatch.setattr(triton_, "memory_scan", lambda *a, **k: forward(*a, **k, tile=32))
    assert mismatches(run(48), few, tolerance=FP32) == {}
