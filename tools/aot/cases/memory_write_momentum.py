"""The writes of a memory with momentum: both memories at the widths of the tuning table, one tile and several tiles a chunk."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_write import momentum_triton as write
from hope_kernels.tuning import Tuning, padded, tuning
from tools.aot.case import Case

OPERANDS = torch.bfloat16
TOKENS = 4096
SHARED = "w u g_prev kappa_prev g_end kappa_end mu"


def entry(width: int, hidden: int) -> Tuning:
    """Tile and warps of a memory's widths."""
    found = tuning(width=width, hidden=hidden)
    assert found is not None
    return found


def constants(width: int, *, per_chunk: int, layers: int) -> dict[str, Any]:
    """Compile-time constants and sizes of the default rule."""
    tile = entry(width, width).tile
    sizes = {"tokens": TOKENS, "num_tiles": TOKENS // tile, "num_chunks": TOKENS // tile // per_chunk, "memories_per_row": 1}
    window = {"first_tile": 16, "end_tile": 32, "inverse_square": 1.0}
    widths = {"K": width, "F": width, "BK": padded(width), "BF": padded(width)}
    shape = {"CHUNK": tile * per_chunk, "TILE": tile, "PER_CHUNK": per_chunk, "LAYERS": layers}
    rule = {"HUBER": True, "ERASE": True, "NORMALIZE": False, "SELF_TARGET": True, "PRECISION": None}
    return {**sizes, **window, **widths, **shape, **rule, "ids_ptr": torch.int32}


def pointers(operands: str, fp32: str, absent: str) -> dict[str, Any]:
    """Arguments "<name>_ptr": in the dtype of the operands, fp32, and left out."""
    kinds = {OPERANDS: operands, torch.float32: fp32, None: absent}
    return {f"{name}_ptr": dtype for dtype, names in kinds.items() for name in names.split()}


def small(width: int) -> str | None:
    """Why products with tokens as rows do not fill a warp group, where they do not."""
    tile = entry(width, width).tile
    return f"tiles of {tile} tokens" if tile < 64 else None


BORNE = {64: 0, 128: 16}
"""Bytes of stack: at 128 three of the kernels move 2 to 6 registers through memory on sm_100a, beside 28 to 60 products a tile."""


def forward(width: int, per_chunk: int, layers: int) -> Case:
    """One memory forward."""
    outer = "error hidden" if layers == 2 else ""
    tensors = pointers(
        f"k v y y_delta residual delta slots rest {outer}",
        f"{SHARED} current {'scale' if layers == 2 else ''}",
        f"commit reset start kept {'' if layers == 2 else 'error hidden scale'}",
    )
    arguments = {**tensors, **constants(width, per_chunk=per_chunk, layers=layers)}
    warps = entry(width, width).warps_of("write_momentum_forward")
    name = f"forward_{'mlp' if layers == 2 else 'linear'}_{width}_{per_chunk}"
    return Case(name, write._forward, arguments, warps, hmma_reason=small(width), max_spill=BORNE[width])


def backward(width: int, per_chunk: int, layers: int) -> Case:
    """One memory backward, with gradients from causal reads."""
    outer = "scale in_error in_hidden read1 slow_read1 d_w" if layers == 2 else ""
    gradients = "d_k d_v d_y d_y_delta d_u d_g_prev d_kappa_prev d_g_end d_kappa_end d_mu"
    tensors = pointers(
        f"k v y y_delta residual delta slots rest low parked {'error hidden' if layers == 2 else ''}",
        f"{SHARED} in_residual in_delta read2 slow_read2 grads anchors part {gradients} {outer}",
        f"commit reset starts {'' if layers == 2 else 'error hidden scale in_error in_hidden read1 slow_read1 d_w'}",
    )
    arguments = {**tensors, **constants(width, per_chunk=per_chunk, layers=layers), "READS_ANCHOR": False}
    warps = entry(width, width).warps_of("write_momentum_backward")
    name = f"backward_{'mlp' if layers == 2 else 'linear'}_{width}_{per_chunk}"
    return Case(name, write._backward, arguments, warps, hmma_reason=small(width), max_spill=BORNE[width])


def cases() -> list[Case]:
    """All of them."""
    kinds = product((64, 128), (1, 4), (2, 1))
    return [make(width, per_chunk, layers) for width, per_chunk, layers in kinds for make in (forward, backward)]
