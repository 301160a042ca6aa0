"""Symmetric products of Newton-Schulz: a Gram matrix of wide and of tall matrices, the polynomial of one, and sizes that need masks."""

from typing import Any

import torch

from hope_kernels.newton_schulz import triton_
from tools.aot.case import Case


def _case(name: str, rows: int, depth: int, dtype: torch.dtype, *, tall: bool = False, add: bool = False) -> Case:
    block, block_depth, warps, stages = triton_.launch(rows, depth, dtype)
    strides = {"stride_m": 1, "stride_n": rows} if tall else {"stride_m": depth, "stride_n": 1}
    arguments: dict[str, Any] = {"x_ptr": dtype, "add_ptr": dtype if add else None, "out_ptr": dtype, "rows": rows, "depth": depth}
    arguments |= {"stride_b": rows * depth, **strides, "add_scale": -4.775, "scale": 2.0315, "ADD": add}
    arguments |= {"EVEN": rows % block == 0, "EVEN_DEPTH": depth % block_depth == 0, "BLOCK": block, "BLOCK_DEPTH": block_depth}
    arguments |= {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
    return Case(name, triton_._symmetric_product, arguments, num_warps=warps, num_stages=stages)


def cases() -> list[Case]:
    """bf16 and fp32, as optimizer steps launch them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        _case("wide_bf16", 2048, 4096, bf16),
        _case("tall_bf16", 2048, 4096, bf16, tall=True),
        _case("polynomial_bf16", 2048, 2048, bf16, add=True),
        _case("head_bf16", 64, 64, bf16, add=True),
        _case("narrow_bf16", 64, 512, bf16),
        _case("masked_bf16", 1008, 1104, bf16, add=True),
        _case("wide_fp32", 2048, 4096, fp32),
        _case("tall_fp32", 2048, 4096, fp32, tall=True),
        _case("polynomial_fp32", 2048, 2048, fp32, add=True),
    ]
