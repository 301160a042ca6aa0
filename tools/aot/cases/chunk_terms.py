"""Terms of a tile, with queries and the erase and without both, and the inverse alone."""

from functools import partial
from typing import Any

import torch

from hope_kernels.chunk_terms import triton_
from hope_kernels.tuning import padded
from tools.aot.case import Case
from tools.aot.memories import entry, small

FORWARD = {
    "fp32": ("eta", "log_alpha", "g", "g_prev", "w", "g_end"),
    "erase": ("inverse",),
    "operands": ("k", "y"),
    "reads": ("q", "m", "n"),
}
BACKWARD = {
    "fp32": ("d_g", "d_g_prev", "d_w", "d_g_end", "d_y", "eta", "log_alpha", "d_k", "d_eta", "d_log_alpha"),
    "fp32_reads": ("d_m", "d_n", "d_q"),
    "erase": ("inverse",),
    "operands": ("k", "y"),
    "reads": ("q", "m"),
}


def _case(
    name: str, kernel: Any, tensors: dict[str, tuple[str, ...]], width: int, *, columns: int, whole: bool = True, min_mma: int = 1
) -> Case:
    found, block = entry(width), padded(width)
    arguments: dict[str, Any] = {
        "first_tile": 0, "num_tiles": 64, "tokens": 4096, "K": width, "BLOCK_K": block, "SLICE": min(block, columns), "CHUNK": 64,
        "TILE": found.tile, "ERASE": whole, "PRECISION": "tf32",
    }  # fmt: skip
    for kind, names in tensors.items():
        dtype = torch.bfloat16 if kind in ("operands", "reads") else torch.float32
        arguments |= dict.fromkeys(names, dtype if whole or kind in ("fp32", "operands") else None)
    label = f"{name}_{width}{'' if whole else '_decay_only'}"
    return Case(label, kernel, arguments, num_warps=found.warps_of(f"terms_{name}"), min_mma=min_mma, hmma_reason=small(found.tile))


def _inverses(width: int) -> list[Case]:
    found, block = entry(width), padded(width)
    reason, warps, tile = small(found.tile), found.warps_of("terms_forward"), {"TILE": found.tile, "PRECISION": "tf32"}
    gates = dict.fromkeys(("eta", "log_alpha", "inverse"), torch.float32)
    sizes = {"tokens": 4096, "K": width, "BLOCK_K": block, "SLICE": min(block, triton_.FORWARD_SLICE), "CHUNK": 64, **tile}
    whole = {"system": torch.float32, "inverse": torch.float32, "SIZE": found.tile, **tile}
    return [
        Case(f"chunk_inverse_{width}", triton_._chunk_inverse, {"k": torch.bfloat16, **gates, **sizes}, warps, hmma_reason=reason),
        # one block of 16 rows is solved row by row, without products
        Case(f"unit_lower_inverse_{found.tile}", triton_._unit_lower_inverse, whole, 4, min_mma=int(found.tile > 16), hmma_reason=reason),
    ]


def cases() -> list[Case]:
    """bf16 at every width of the tuning table, and at one that fills no block."""
    forward = partial(_case, "forward", triton_._terms_forward, FORWARD, columns=triton_.FORWARD_SLICE)
    backward = partial(_case, "backward", triton_._terms_backward, BACKWARD, columns=triton_.BACKWARD_SLICE)
    terms = [make(width=width) for width in (48, 64, 128) for make in (forward, backward)]
    decays = [make(width=64, whole=False, min_mma=0) for make in (forward, backward)]
    return terms + decays + _inverses(64) + _inverses(128)
