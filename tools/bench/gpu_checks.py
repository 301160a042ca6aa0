"""The operations on this device against float64, with fresh random inputs: values, every gradient, and bit-wise repetition.

A check is named "<operation> ...", which is how it travels to a worker process. Tolerances are those of the tests, relative norms:
fp32 1e-5; bf16 5e-3 for values and 1.5e-2 for gradients. What a kernel leaves unwritten is NaN (torch's deterministic mode fills it).
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hope_kernels.backend import scan_obstacle
from hope_kernels.linear_cross_entropy import linear_cross_entropy
from hope_kernels.newton_schulz import newton_schulz
from hope_kernels.pointwise import conv_silu, norm_gate
from hope_kernels.projection_scan import Generated
from hope_kernels.projection_scan.chunked import write_chunk
from hope_kernels.rule import MemoryRule
from hope_pt.testing.scans import Size, memory_leaves, projection_leaves, random_masks, run_memory, run_projection, states, with_gradients

FP32, BF16_VALUES, BF16_GRADIENTS = 1e-5, 5e-3, 1.5e-2
BF16_STATE = 1e-2
"""End states of the memory scan: rounding the anchor before it meets the keys costs 3e-3 to 5e-3 by itself (docs/log.md)."""
NEWTON_SCHULZ = 1.5
"""In bf16 the iteration is chaotic in its last bits: no worse than this times plain torch in the same dtype."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """A check's outcome: the largest relative error of values and of gradients, and what is wrong ("" if nothing)."""

    values: float
    gradients: float
    wrong: str


def names(*, small: bool) -> list[str]:
    """All checks, or one of every operation at the smallest sizes, of the scans in one dtype each."""
    dtypes = ("fp32", "bf16")
    if small:
        scans = ["memory mlp causal random 24x20 bf16", "memory linear causal random 16x16 fp32", "projection mlp random 16x16 bf16"]
    else:
        widths = ("24x20", "64x64", "96x96", "128x128")
        memories = [name for name, rule in MEMORIES.items() if not scan_obstacle(rule, width=64, hidden=64)]
        scans = [f"memory {m} causal {k} 64x64 {d}" for m in memories for k in ("random", "correlated", "identical") for d in dtypes]
        scans += [f"memory {m} {r} correlated {w} {d}" for m in memories for r in ("causal", "anchor") for w in widths for d in dtypes]
        scans += [f"projection {m} correlated {w} {d}" for m in ("mlp", "linear") for w in widths for d in dtypes]
        scans = list(dict.fromkeys(scans))
    rest = ("newton_schulz", "linear_cross_entropy", "conv_silu", "norm_gate")
    return scans + [f"{name} {d}" for name in rest for d in dtypes]


MEMORIES = {
    "mlp": MemoryRule(),
    "linear": MemoryRule(memory="linear"),
    "momentum": MemoryRule(momentum=True),
    "gd": MemoryRule(update="gd", self_target=False),
}


def task(name: str, seed: int, device: str, small: bool) -> dict[str, Any]:
    """`run` for a worker process."""
    return vars(run(name, seed=seed, device=torch.device(device), small=small))


def run(name: str, *, seed: int, device: torch.device, small: bool) -> Found:
    """One check."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    seed += zlib.crc32(name.encode())
    kind, *words = name.split()
    if kind in ("memory", "projection"):
        return _scan(kind, words, seed, device, small=small)
    dtype = _dtype(words[-1])
    if kind == "newton_schulz":
        return _newton_schulz(dtype, seed, device, small=small)
    make, call = {"linear_cross_entropy": _head, "conv_silu": _conv, "norm_gate": _norm}[kind](seed, small=small)
    # The weights of pointwise operations are parameters, which stay fp32; the head's is a matrix.
    kept = () if kind == "linear_cross_entropy" else ("weight",)
    leaves = {key: t.to(device, dtype if key not in kept and t.is_floating_point() else t.dtype) for key, t in make.items()}
    wanted = _with_gradients(functools.partial(call, backend="reference"), {k: _wide(t) for k, t in leaves.items()})
    got, again = (_with_gradients(functools.partial(call, backend="triton"), leaves) for _ in range(2))
    return _compare(got, again, wanted, dtype)


def _scan(kind: str, words: list[str], seed: int, device: torch.device, *, small: bool) -> Found:
    *_, widths, dtype_name = words
    rule, dtype = MEMORIES[words[0]], _dtype(dtype_name)
    width, hidden = (int(n) for n in widths.split("x"))
    tokens, chunk = (40, 16) if small else (333, 64)
    size = Size(batch=2, heads=1 if small else 3, tokens=tokens, width=width, hidden=hidden if rule.memory == "mlp" else width)
    masks = _moved(random_masks(size, chunk, seed=seed), device)
    if kind == "memory":
        read, keys = words[1], words[2]
        leaves = memory_leaves(rule, size=size, keys=keys, eta_max=1.0 if rule.update == "dgd" else 1 / chunk, seed=seed)
        run_once = functools.partial(run_memory, rule=rule, chunk=chunk, read=read, masks=masks, save_every=2 * chunk)
    else:
        leaves = projection_leaves(rule, size=size, seed=seed)
        masks = masks if dtype == torch.float32 else None
        run_once = functools.partial(run_projection, rule=rule, chunk=chunk, masks=masks, save_every=2 * chunk)
    narrow = {n: t.to(device, dtype if n in ("q", "k", "v") else torch.float32) for n, t in leaves.items()}
    if kind == "projection" and masks is None:
        # Both sides start from the same rounded weights, small enough that a memory reads about what it is given, and keep most of them:
        # where all is forgotten, what is left is a difference of rounded predictions and targets.
        narrow |= {n: (0.5 * t).bfloat16().float() for n, t in narrow.items() if n.startswith("state.")}
        narrow |= {f"readout.{i}": 0.3 * narrow[f"readout.{i}"] - (3.0 if i == 3 else 0.0) for i in range(4)}
    wanted = _joined(run_once({name: t.double() for name, t in narrow.items()}, backend="chunked"))
    got, again = (_joined(run_once(narrow, backend="triton")) for _ in range(2))
    if kind == "projection" and masks is None:
        wanted |= _writes(got, narrow, rule, chunk)
    return _compare(got, again, wanted, dtype)


def _writes(got: Tensors, leaves: Tensors, rule: MemoryRule, chunk: int) -> Tensors:
    """End states of exact writes of what the operation generated: in bf16 its rounding alone moves them by the tolerance."""
    state, _ = states({n: t.double() for n, t in leaves.items()}, rule)
    for first in range(0, got["k"].shape[2], chunk):
        here = Generated(*(got[n][:, :, first : first + chunk].double() for n in ("k", "v", "q", "eta", "log_alpha")))
        state = write_chunk(state, here, None, rule=rule)
    return {f"end.{i}": t for i, t in enumerate(state.tensors())}


def _joined(found: Tensors) -> Tensors:
    """Each readout's gradient as one tensor: alone, that of its bias is a sum over all tokens that may come near zero by chance."""
    readouts = (
        {f"dreadout {i}": [found.pop(f"dreadout.{2 * i + j}").flatten() for j in range(2)] for i in range(2)}
        if "dreadout.0" in found
        else {}
    )
    return found | {name: torch.cat(parts) for name, parts in readouts.items()}


def _moved(masks, device: torch.device):
    return type(masks)(*(None if m is None else m.to(device) for m in (masks.commit_BN, masks.reset_BN)))


def _dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def _compare(got: Tensors, again: Tensors, wanted: Tensors, dtype: torch.dtype) -> Found:
    """Errors against the float64 run; `again` must equal `got` bit for bit: no kernel sums in an order that time decides."""
    errors = {n: _error(t, wanted[n]) for n, t in got.items()}
    values = max(e for n, e in errors.items() if not _is_gradient(n))
    gradients = max((e for n, e in errors.items() if _is_gradient(n)), default=0.0)
    narrow = dtype == torch.bfloat16
    limits = {n: _bf16_limit(n) if narrow else FP32 for n in got}
    wrong = [f"{n} {errors[n]:.1e}" for n in got if not errors[n] <= limits[n]]
    wrong += [f"{n} differs in a second run" for n in got if not torch.equal(got[n], again[n])]
    return Found(values, gradients, ", ".join(wrong))


def _bf16_limit(name: str) -> float:
    if _is_gradient(name):
        return BF16_GRADIENTS
    return BF16_STATE if name.startswith("end.") else BF16_VALUES


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative norm of the difference; infinite where a number is missing."""
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-3)
    return torch.nan_to_num(difference, nan=torch.inf).item()


def _is_gradient(name: str) -> bool:
    return name.startswith("d")


def _with_gradients(call: Callable[[Tensors], Tensors], leaves: Tensors) -> Tensors:
    """Values and gradients of the floating leaves."""
    leaves = {n: t.detach().clone() for n, t in leaves.items()}
    wanted = {n: t.requires_grad_() for n, t in leaves.items() if t.is_floating_point()}
    return with_gradients(call(leaves), wanted)


def _head(seed: int, *, small: bool) -> tuple[Tensors, Callable[..., Tensors]]:
    tokens, width, vocabulary = (5, 16, 40) if small else (333, 192, 5003)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::7] = -100

    def call(leaves: Tensors, *, backend: str) -> Tensors:
        return {"losses": linear_cross_entropy(leaves["hidden"], leaves["weight"], leaves["targets"], backend=backend)}

    return {"hidden": hidden, "weight": weight, "targets": targets}, call


def _conv(seed: int, *, small: bool) -> tuple[Tensors, Callable[..., Tensors]]:
    batch, tokens, heads, width = (1, 5, 2, 16) if small else (2, 333, 3, 96)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, 3 * width, generator=generator)
    weight = torch.randn(heads, 3 * width, 4, generator=generator)

    def call(leaves: Tensors, *, backend: str) -> Tensors:
        x = leaves["x"]
        return dict(zip(("q", "k", "v"), conv_silu(x, leaves["weight"], dtype=x.dtype, backend=backend), strict=True))

    return {"x": x, "weight": weight}, call


def _norm(seed: int, *, small: bool) -> tuple[Tensors, Callable[..., Tensors]]:
    batch, tokens, heads, width = (1, 5, 2, 16) if small else (2, 333, 3, 96)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, heads, tokens, width, generator=generator)
    weight, gate = torch.randn(heads, width, generator=generator), torch.randn(batch, tokens, heads, width, generator=generator)

    def call(leaves: Tensors, *, backend: str) -> Tensors:
        return {"out": norm_gate(leaves["y"], leaves["weight"], leaves["gate"], eps=1e-6, backend=backend)}

    return {"y": y, "weight": weight, "gate": gate}, call


def _newton_schulz(dtype: torch.dtype, seed: int, device: torch.device, *, small: bool) -> Found:
    size = (2, 24, 40) if small else (5, 200, 333)
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    wanted = newton_schulz(x.double(), backend="reference")
    got, again, plain = (newton_schulz(x, backend=backend) for backend in ("triton", "triton", "chunked"))
    error, limit = _error(got, wanted), max(NEWTON_SCHULZ * _error(plain, wanted), FP32)
    wrong = "" if error <= limit else f"{error:.1e}, allowed {limit:.1e}"
    return Found(error, 0.0, wrong or ("" if torch.equal(got, again) else "differs in a second run"))
