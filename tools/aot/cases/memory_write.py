"""The writes of a memory: both memories at the widths of the tuning table, one tile and several tiles a chunk."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_write import triton_ as write
from hope_kernels.tuning import padded, tuning
from tools.aot.case import Case

OPERANDS = torch.bfloat16
TOKENS = 4096


def constants(width: int, hidden: int, *, per_chunk: int) -> dict[str, Any]:
    """Compile-time constants and sizes of the default rule."""
    tile = tuning(width=width, hidden=hidden).tile
    sizes = {"tokens": TOKENS, "num_tiles": TOKENS // tile, "num_chunks": TOKENS // tile // per_chunk, "memories_per_row": 5}
    window = {"first_tile": 16, "end_tile": 32, "inverse_square": 1.0}
    shape = {"K": width, "BK": padded(width), "CHUNK": tile * per_chunk, "TILE": tile, "PER_CHUNK": per_chunk}
    rule = {"HUBER": True, "ERASE": True, "NORMALIZE": False, "SELF_TARGET": True, "PRECISION": None}
    return {**sizes, **window, **shape, **rule}


def pointers(operands: str, fp32: str, absent: str) -> dict[str, Any]:
    """Arguments "<name>_ptr": in the dtype of the operands, fp32, and left out."""
    kinds = {OPERANDS: operands, torch.float32: fp32, None: absent}
    return {f"{name}_ptr": dtype for dtype, names in kinds.items() for name in names.split()}


def mlp_forward(width: int, hidden: int, per_chunk: int) -> Case:
    """One MLP memory forward."""
    tensors = pointers(
        "k v y residual error hidden w2 w1", "w g_prev g_end current2 current1 scale", "commit reset start2 start1 kept2 kept1"
    )
    arguments = {**tensors, **constants(width, hidden, per_chunk=per_chunk), "F": hidden, "BF": padded(hidden)}
    warps = tuning(width=width, hidden=hidden).warps_of("write_forward")
    return Case(f"mlp_forward_{width}x{hidden}_{per_chunk}", write._mlp_forward, arguments, warps)


def linear_forward(width: int, per_chunk: int) -> Case:
    """One linear memory forward."""
    tensors = pointers("k v y residual w", "g_prev g_end current", "commit reset start kept")
    warps = tuning(width=width, hidden=width).warps_of("write_forward")
    return Case(
        f"linear_forward_{width}_{per_chunk}", write._linear_forward, {**tensors, **constants(width, width, per_chunk=per_chunk)}, warps
    )


def cases() -> list[Case]:
    """All of them."""
    shapes = list(product((64, 128), (1, 4)))
    return [make for width, per_chunk in shapes for make in (mlp_forward(width, width, per_chunk), linear_forward(width, per_chunk))]
