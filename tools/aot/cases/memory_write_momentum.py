"""The writes of a memory with momentum: both memories at the widths of the tuning table, one tile and several tiles a chunk."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_write import momentum_triton as write
from hope_kernels.tuning import padded
from tools.aot.case import Case
from tools.aot.memories import entry, pointers, small, writes

SHARED = "w u g_prev kappa_prev g_end kappa_end mu"


def constants(width: int, *, per_chunk: int, layers: int) -> dict[str, Any]:
    """Sizes and constants of one memory a row."""
    shared = writes(width, tile=entry(width).tile, per_chunk=per_chunk, memories_per_row=1)
    return {**shared, "F": width, "BF": padded(width), "LAYERS": layers, "ids_ptr": torch.int32}


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
    warps = entry(width).warps_of("write_momentum_forward")
    name = f"forward_{'mlp' if layers == 2 else 'linear'}_{width}_{per_chunk}"
    return Case(name, write._forward, arguments, warps, hmma_reason=small(entry(width).tile), max_spill=BORNE[width])


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
    warps = entry(width).warps_of("write_momentum_backward")
    name = f"backward_{'mlp' if layers == 2 else 'linear'}_{width}_{per_chunk}"
    return Case(name, write._backward, arguments, warps, hmma_reason=small(entry(width).tile), max_spill=BORNE[width])


def cases() -> list[Case]:
    """All of them."""
    kinds = product((64, 128), (1, 4), (2, 1))
    return [make(width, per_chunk, layers) for width, per_chunk, layers in kinds for make in (forward, backward)]
