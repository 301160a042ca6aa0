"""What the cases of kernels around a memory share: its entry of the tuning table, why products are small, pointers, the default rule."""

from typing import Any

import torch

from hope_kernels.tuning import Tuning, padded, tuning

OPERANDS = torch.bfloat16
TOKENS = 4096


def entry(width: int, hidden: int | None = None) -> Tuning:
    """Tile and warps of a memory's head width and hidden width, which is the head width where it is not given."""
    found = tuning(width=width, hidden=width if hidden is None else hidden)
    assert found is not None
    return found


def small(tile: int) -> str | None:
    """Why products with a tile's tokens as rows may be those of single warps."""
    return f"tiles of {tile} rows" if tile < 64 else None


def pointers(operands: str, fp32: str, absent: str) -> dict[str, Any]:
    """Arguments "<name>_ptr": in the dtype of the operands, fp32, and left out."""
    kinds = {OPERANDS: operands, torch.float32: fp32, None: absent}
    return {f"{name}_ptr": dtype for dtype, names in kinds.items() for name in names.split()}


def writes(width: int, *, tile: int, per_chunk: int, memories_per_row: int) -> dict[str, Any]:
    """Sizes and compile-time constants of the writes of a memory with the default rule."""
    chunk = tile * per_chunk
    sizes = {"tokens": TOKENS, "num_tiles": TOKENS // tile, "num_chunks": TOKENS // chunk, "memories_per_row": memories_per_row}
    window = {"first_tile": 16, "end_tile": 32, "inverse_square": 1.0}
    shape = {"K": width, "BK": padded(width), "CHUNK": chunk, "TILE": tile, "PER_CHUNK": per_chunk}
    rule = {"HUBER": True, "ERASE": True, "NORMALIZE": False, "SELF_TARGET": True, "PRECISION": None}
    return {**sizes, **window, **shape, **rule}
