"""The writes of a memory: both memories at the widths of the tuning table, chunks of one tile and of several."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_write import triton_ as write
from hope_kernels.tuning import padded
from tools.aot.case import Case
from tools.aot.memories import entry, pointers, small, writes

LONG = 256  # tokens of a chunk of several tiles


def constants(width: int, hidden: int, *, chunk: int) -> dict[str, Any]:
    """Sizes and constants for chunks of `chunk` tokens, with the memories of a projection scan."""
    tile = entry(width, hidden).tile_of(chunk)
    return writes(width, tile=tile, per_chunk=chunk // tile, memories_per_row=5)


def reason(width: int, chunk: int) -> str | None:
    """Why products of single warps are allowed."""
    return small(entry(width).tile_of(chunk))


def mlp_forward(width: int, hidden: int, chunk: int) -> Case:
    """One MLP memory forward."""
    tensors = pointers(
        "k v y residual error hidden w2 w1 rest2 rest1", "w g_prev g_end current2 current1 scale", "commit reset start2 start1 kept2 kept1"
    )
    arguments = {**tensors, **constants(width, hidden, chunk=chunk), "F": hidden, "BF": padded(hidden), "ids_ptr": torch.int32}
    warps = entry(width, hidden).warps_of("write_forward")
    return Case(f"mlp_forward_{width}x{hidden}_{chunk}", write._mlp_forward, arguments, warps, hmma_reason=reason(width, chunk))


def linear_forward(width: int, chunk: int) -> Case:
    """One linear memory forward."""
    tensors = pointers("k v y residual w rest", "g_prev g_end current", "commit reset start kept")
    warps = entry(width).warps_of("write_forward")
    arguments = {**tensors, **constants(width, width, chunk=chunk)}
    return Case(f"linear_forward_{width}_{chunk}", write._linear_forward, arguments, warps, hmma_reason=reason(width, chunk))


def mlp_backward(width: int, hidden: int, chunk: int) -> Case:
    """One MLP memory backward, with gradients from causal reads."""
    fp32 = "w g_prev g_end scale in_residual in_error in_hidden read2 read1 sums d_k d_v d_y d_w d_g_prev d_g_end"
    tensors = pointers("k v y w2 w1 rest2 rest1 residual error hidden parked", fp32, "commit reset start2 start1")
    sizes = {**constants(width, hidden, chunk=chunk), "F": hidden, "BF": padded(hidden)}
    arguments = {**tensors, **sizes, "READS_ANCHOR": False, "ids_ptr": torch.int32}
    warps = entry(width, hidden).warps_of("write_backward")
    return Case(f"mlp_backward_{width}x{hidden}_{chunk}", write._mlp_backward, arguments, warps, hmma_reason=reason(width, chunk))


def linear_backward(width: int, chunk: int) -> Case:
    """One linear memory backward, with gradients from causal reads."""
    fp32 = "g_prev g_end in_residual read sums d_k d_v d_y d_g_prev d_g_end"
    tensors = pointers("k v y w rest residual parked", fp32, "commit reset start")
    warps = entry(width).warps_of("write_linear_backward")
    arguments = {**tensors, **constants(width, width, chunk=chunk), "READS_ANCHOR": False, "ids_ptr": torch.int32}
    return Case(f"linear_backward_{width}_{chunk}", write._linear_backward, arguments, warps, hmma_reason=reason(width, chunk))


def cases() -> list[Case]:
    """All of them."""
    found = []
    for width, long in product((64, 128), (False, True)):
        chunk = LONG if long else entry(width).tile
        found += [make(width, width, chunk) for make in (mlp_forward, mlp_backward)]
        found += [make(width, chunk) for make in (linear_forward, linear_backward)]
    return found
