"""Convolution with SiLU and norm with gate on columns of the input projection, forward and backward."""

from typing import Any

import torch

from hope_kernels.pointwise import triton_
from hope_kernels.tuning import padded
from tools.aot.case import Case

HEADS, TOKENS = 16, 4096
WIDTHS = (48, 64, 128)


def _block(kernel: str, width: int, elements: int) -> tuple[dict[str, Any], int]:
    """Arguments that every kernel has, and its warps."""
    warps = triton_.warps_of(kernel, width)
    rows = triton_.rows_of(width, warps=warps, elements=elements)
    return {"tokens": TOKENS, "heads": HEADS, "K": width, "BLOCK_K": padded(width), "ROWS": rows}, warps


def _conv(width: int, columns: int, dtype: torch.dtype, *, backward: bool) -> Case:
    """Columns: of the projection for one head."""
    name = "conv_silu_backward" if backward else "conv_silu_forward"
    arguments, warps = _block(name, width, triton_.CONV_ELEMENTS)
    arguments |= {"x_ptr": dtype, "weight_ptr": torch.float32, "RUN": triton_.RUN}
    arguments |= {"stride_b": TOKENS * HEADS * columns, "stride_t": HEADS * columns, "stride_h": columns, "stride_x": 1}
    if backward:
        arguments |= {"d_q_ptr": dtype, "d_k_ptr": dtype, "d_v_ptr": dtype, "d_x_ptr": dtype, "d_weight_ptr": torch.float32}
        kernel = triton_._conv_backward
    else:
        arguments |= {"q_ptr": dtype, "k_ptr": dtype, "v_ptr": dtype}
        kernel = triton_._conv_forward
    return Case(f"{name}_{width}x{columns}_{str(dtype)[6:]}", kernel, arguments, num_warps=warps, num_stages=3, min_mma=0)


def _norm(width: int, dtype: torch.dtype, *, backward: bool) -> Case:
    name = "norm_gate_backward" if backward else "norm_gate_forward"
    arguments, warps = _block(name, width, triton_.NORM_ELEMENTS)
    columns = 4 * width
    arguments |= {"y_ptr": dtype, "weight_ptr": torch.float32, "gate_ptr": dtype, "eps": 1e-6}
    arguments |= {"y_b": HEADS * TOKENS * width, "y_h": TOKENS * width, "y_t": width, "y_k": 1}
    arguments |= {"gate_b": TOKENS * HEADS * columns, "gate_t": HEADS * columns, "gate_h": columns, "gate_k": 1}
    if backward:
        arguments |= {"d_out_ptr": dtype, "d_y_ptr": dtype, "d_weight_ptr": torch.float32, "d_gate_ptr": dtype}
        kernel = triton_._norm_backward
    else:
        arguments |= {"out_ptr": dtype}
        kernel = triton_._norm_forward
    return Case(f"{name}_{width}_{str(dtype)[6:]}", kernel, arguments, num_warps=warps, num_stages=3, min_mma=0)


def cases() -> list[Case]:
    """Three widths in bf16, one in fp32, and the odd columns that a momentum logit makes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = []
    for backward in (False, True):
        found += [_conv(width, 4 * width, bf16, backward=backward) for width in WIDTHS]
        found += [_conv(64, 4 * 64 + 1, bf16, backward=backward), _conv(64, 4 * 64, fp32, backward=backward)]
        found += [_norm(width, bf16, backward=backward) for width in WIDTHS] + [_norm(64, fp32, backward=backward)]
    return found
