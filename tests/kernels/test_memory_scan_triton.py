"""The memory scan in Triton against the token recurrence in float64: values, end states and every gradient.

Legend: B batch, H heads, T tokens, K head width, F hidden width.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from hope_kernels.memory_scan import memory_scan, triton_
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState
from hope_pt.testing.scans import Size, memory_leaves, mismatches, random_masks, run_memory, states, with_gradients

FP32 = 1e-5
BF16 = 5e-3
BF16_STATE = 1e-2
"""States are fp32, but a chunk's error signals are taken at its anchor rounded to bf16, and what an erase leaves of a state carries the
rounding of what was there: that rounding alone, all else exact, moves the end states of these sequences by 3e-3 to 5e-3 of their norm, all
roundings of operands by 5e-3 to 8e-3."""
BF16_GRADIENT = 1.5e-2
OPERANDS = ("q", "k", "v")


@dataclass(frozen=True)
class Case:
    """One scan; the defaults have padded widths, a partial last chunk, two segments and eta up to 1."""

    rule: MemoryRule = MemoryRule()
    size: Size = Size(batch=1, heads=1, tokens=27, width=12, hidden=20)
    chunk: int = 16
    read: str = "causal"
    keys: str = "random"
    retention: str = "mixed"
    eta_max: float = 1.0
    masked: bool = False
    save_every: int = 16

    @property
    def masks(self) -> ChunkMasks:
        return random_masks(self.size, self.chunk) if self.masked else ChunkMasks()

    def leaves(self) -> dict[str, torch.Tensor]:
        return memory_leaves(self.rule, size=self.size, keys=self.keys, retention=self.retention, eta_max=self.eta_max)


def on_device(leaves: dict[str, torch.Tensor], operands: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """q, k and v in the operand dtype, the rest in fp32."""
    return {name: t.to(device, operands if name in OPERANDS else torch.float32) for name, t in leaves.items()}


def moved(masks: ChunkMasks, device: torch.device) -> ChunkMasks:
    return ChunkMasks(*(None if m is None else m.to(device) for m in (masks.commit_BN, masks.reset_BN)))


def check(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    low = on_device(case.leaves(), dtype, device)
    exact = {name: t.cpu().double() for name, t in low.items()}
    same = {"chunk": case.chunk, "read": case.read}
    wanted = run_memory(exact, case.rule, masks=case.masks, backend="reference", **same)
    got = run_memory(low, case.rule, masks=moved(case.masks, device), backend="triton", save_every=case.save_every, **same)
    assert {got[name].dtype for name in ("y", "dq", "dk", "dv")} == {dtype} and got["deta"].dtype == torch.float32
    compare({name: t.cpu() for name, t in got.items()}, wanted, dtype)


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    tolerances = {"y": BF16, "end": BF16_STATE, "d": BF16_GRADIENT}
    assert got.keys() == wanted.keys()
    for kind, bf16 in tolerances.items():
        first, second = ({n: t for n, t in found.items() if n.startswith(kind)} for found in (got, wanted))
        assert mismatches(first, second, tolerance=FP32 if dtype == torch.float32 else bf16) == {}


SHAPE = Case().size
CASES = {
    "random keys, two heads": Case(size=replace(SHAPE, heads=2)),
    "correlated keys, memory lost": Case(keys="correlated", retention="zero"),
    "identical keys, nothing lost": Case(keys="identical", retention="one"),
    "chunk shorter than a tile": Case(chunk=5, size=replace(SHAPE, tokens=13), save_every=10),
    "several tiles a chunk": Case(chunk=40, size=replace(SHAPE, tokens=61), save_every=40),
    "several tiles a chunk, masked": Case(chunk=20, size=replace(SHAPE, batch=2, tokens=43), save_every=20, masked=True),
    "one token": Case(size=Size(batch=1, heads=1, tokens=1, width=16, hidden=16)),
    "less than a tile": Case(size=Size(batch=1, heads=1, tokens=7, width=16, hidden=24)),
    "masked": Case(size=replace(SHAPE, batch=3), chunk=8, save_every=16, masked=True),
    "anchor": Case(read="anchor"),
    "anchor, several tiles a chunk, masked": Case(
        read="anchor", chunk=24, size=replace(SHAPE, batch=3, heads=1), save_every=24, masked=True
    ),
}
RULES = {
    "l2": MemoryRule(objective="l2"),
    "gd": MemoryRule(update="gd", huber_delta=0.5),
    "v as it is": MemoryRule(self_target=False),
    "unit v": MemoryRule(normalize_v=True),
    "linear": MemoryRule(memory="linear"),
    "linear, gd, unit v": MemoryRule(memory="linear", update="gd", normalize_v=True),
    "linear, v as it is": MemoryRule(memory="linear", self_target=False, objective="l2"),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_against_the_recurrence(case, dtype, device):
    check(CASES[case], dtype, device)


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, dtype, device):
    # unbounded errors of a layer without the erase diverge where the learning rates of a chunk sum up to more than 2
    check(Case(rule=RULES[rule], chunk=20, save_every=20, eta_max=0.1 if RULES[rule].objective == "l2" else 1.0), dtype, device)


@pytest.mark.parametrize("read", ["causal", "anchor"])
def test_results_depend_neither_on_tiles_nor_on_segments(read, device, monkeypatch):
    case = Case(chunk=24, size=replace(SHAPE, tokens=53), read=read)
    leaves = on_device(case.leaves(), torch.float32, device)
    run = lambda save_every: run_memory(leaves, case.rule, chunk=24, read=read, backend="triton", save_every=save_every)  # noqa: E731
    few = run(1000)
    assert mismatches(run(24), few, tolerance=FP32) == {}
    forward = triton_.memory_scan
    monkeypatch.setattr(triton_, "memory_scan", lambda *a, **k: forward(*a, **k, tile=32))
    assert mismatches(run(48), few, tolerance=FP32) == {}


def test_a_split_run_equals_the_whole(device):
    case = Case()
    leaves = on_device(case.leaves(), torch.float32, device)
    whole = run_memory(leaves, case.rule, chunk=16, backend="triton")
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    state, start = states(leaves, case.rule)
    outputs = []
    for part in (slice(0, 16), slice(16, 27)):
        streams = [leaves[name][:, :, part] for name in ("q", "k", "v", "eta", "log_alpha")]
        y, state = memory_scan(*streams, state, rule=case.rule, chunk=16, start=start, backend="triton")
        outputs.append(y)
    split = {"y": torch.cat(outputs, 2), **{f"end.{i}": t for i, t in enumerate(state.tensors())}}
    assert mismatches(with_gradients(split, leaves), whole, tolerance=FP32) == {}


def test_an_end_state_that_is_not_kept_changes_nothing_else(device):
    case = Case()
    leaves = {name: t.requires_grad_() for name, t in on_device(case.leaves(), torch.float32, device).items()}
    state, _ = states(leaves, case.rule)
    runs = []
    for keep_state in (True, False):
        streams = [leaves[name] for name in ("q", "k", "v", "eta", "log_alpha")]
        y, end = memory_scan(*streams, state, rule=case.rule, chunk=16, save_every=16, keep_state=keep_state, backend="triton")
        assert (end is None) == (not keep_state)
        runs.append(with_gradients({"y": y}, leaves))
    assert mismatches(runs[1], runs[0], tolerance=0.0) == {}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_operator_is_registered_soundly(masked, device):
    case = Case(size=Size(batch=1, heads=1, tokens=9, width=16, hidden=16), chunk=8, masked=masked)
    leaves = {name: t.flatten(0, 1) if t.dim() > 3 or name in ("eta", "log_alpha") else t for name, t in case.leaves().items()}
    leaves = {name: t.to(device, torch.float32).requires_grad_() for name, t in leaves.items()}
    streams = [leaves[name] for name in ("q", "k", "v", "eta", "log_alpha")]
    state, start = ([leaves[f"{name}.{i}"] for i in range(2)] for name in ("state", "start"))
    commit, reset = (None if m is None else m.to(device, torch.uint8) for m in (case.masks.commit_BN, case.masks.reset_BN))
    settings = ("mlp", "huber", 1.0, "dgd", True, False, "causal", 8, 16, 8, True)
    torch.library.opcheck(triton_.scan, (streams, state, start if masked else [], commit, reset, *settings))


def test_float64_is_refused(device):
    case = Case()
    leaves = {name: t.to(device) for name, t in case.leaves().items()}
    streams = [leaves[name] for name in ("q", "k", "v", "eta", "log_alpha")]
    state = MemoryState((leaves["state.0"], leaves["state.1"]))
    with pytest.raises(ValueError, match="float64"):
        memory_scan(*streams, state, rule=case.rule, chunk=16, backend="triton")
