"""Newton-Schulz with a Triton kernel for symmetric products, which computes the blocks on and below the diagonal and mirrors them.

A = X X^T and b A + c A A are both symmetric, so half of their blocks are redundant; the third product of a step, P X, is not and stays
with torch. Legend: B matrices, M the shorter side, N the longer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hope_kernels.newton_schulz.chunked import iterate
from hope_kernels.triton_support import operator
from hope_kernels.tuning import padded

MAX_BLOCK = {torch.bfloat16: (128, 64), torch.float32: (64, 32)}
"""Largest block of the result and of the sum; fp32 takes three products and twice the shared memory for each."""
MAX_STAGES = 3
ALIGNMENT = 16
"""Divisor of both sides from which Triton knows that rows are aligned to its widest loads."""


@triton.jit
def _symmetric_product(
    x_ptr,
    add_ptr,
    out_ptr,
    rows,
    depth,
    stride_b,
    stride_m,
    stride_n,
    add_scale,
    scale,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block (i, j <= i) of out = scale x x^T + add_scale add of one matrix, stored at (j, i) too.

    x [B, rows, depth] by its strides; add (symmetric, where ADD) and out [B, rows, rows] contiguous.
    """
    across = tl.cdiv(rows, BLOCK)
    blocks = across * (across + 1) // 2
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks
    i = ((tl.sqrt(8.0 * place + 1.0) - 1.0) * 0.5).to(tl.int32)  # i (i + 1) / 2 <= place, up to the rounding of the root
    i = tl.where(i * (i + 1) // 2 > place, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= place, i + 1, i)
    j = place - i * (i + 1) // 2

    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_DEPTH)
    x_ptr += matrix * stride_b
    left_ptrs = x_ptr + row[:, None].to(tl.int64) * stride_m + inner[None, :] * stride_n
    right_ptrs = x_ptr + column[:, None].to(tl.int64) * stride_m + inner[None, :] * stride_n
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, depth, BLOCK_DEPTH):
        if EVEN and EVEN_DEPTH:
            left = tl.load(left_ptrs)
            right = tl.load(right_ptrs)
        else:
            inside = inner[None, :] < depth - start
            left = tl.load(left_ptrs, mask=inside & (row[:, None] < rows), other=0.0)
            right = tl.load(right_ptrs, mask=inside & (column[:, None] < rows), other=0.0)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
        left_ptrs += BLOCK_DEPTH * stride_n
        right_ptrs += BLOCK_DEPTH * stride_n

    base = matrix * rows * rows
    here = base + row[:, None].to(tl.int64) * rows + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < rows)
    product *= scale
    if ADD:
        product += add_scale * tl.load(add_ptr + here, mask=inside, other=0.0).to(tl.float32)
    result = product.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + here, result, mask=inside)
    if i != j:
        mirrored = base + column[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(out_ptr + mirrored, tl.trans(result), mask=(column[:, None] < rows) & (row[None, :] < rows))


class Launch(NamedTuple):
    """Sides of the blocks of the result and of the sum, warps, and stages of the loop over the sum."""

    block: int
    block_depth: int
    warps: int
    stages: int


def launch(rows: int, depth: int, dtype: torch.dtype) -> Launch:
    """How x [rows, depth] is multiplied."""
    block, block_depth = (min(most, padded(side)) for most, side in zip(MAX_BLOCK[dtype], (rows, depth)))
    warps = 8 if dtype == torch.bfloat16 and block >= 64 else 4  # four would spill on Blackwell under triton 3.9
    return Launch(block, block_depth, warps, min(MAX_STAGES, triton.cdiv(depth, block_depth)))


def symmetric_product(
    x_BMN: torch.Tensor, *, scale: float = 1.0, add_BMM: torch.Tensor | None = None, add_scale: float = 0.0
) -> torch.Tensor:
    """The product scale x x^T + add_scale add, [B, M, M], symmetric where `add` is; bf16 or fp32.

    x has any strides, add is contiguous. Sides that are multiples of ALIGNMENT are fast, others correct.
    """
    batch, rows, depth = x_BMN.shape
    assert x_BMN.dtype in MAX_BLOCK
    assert add_BMM is None or (add_BMM.is_contiguous() and add_BMM.shape == (batch, rows, rows) and add_BMM.dtype == x_BMN.dtype)
    block, block_depth, warps, stages = launch(rows, depth, x_BMN.dtype)
    across = triton.cdiv(rows, block)
    out = torch.empty(batch, rows, rows, dtype=x_BMN.dtype, device=x_BMN.device)
    _symmetric_product[(batch * across * (across + 1) // 2,)](
        x_BMN, add_BMM, out, rows, depth, *x_BMN.stride(), add_scale, scale,
        ADD=add_BMM is not None, EVEN=rows % block == 0, EVEN_DEPTH=depth % block_depth == 0, BLOCK=block, BLOCK_DEPTH=block_depth,
        PRECISION="tf32x3" if x_BMN.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def gram_polynomial(x_BMN: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """P = b A + c A A of A = x x^T; A A = A A^T because A is symmetric."""
    gram = symmetric_product(x_BMN)
    return symmetric_product(gram, scale=c, add_BMM=gram, add_scale=b)


@operator("newton_schulz")
def _newton_schulz(x: torch.Tensor, steps: int, coefficients: list[float], eps: float, dtype: torch.dtype) -> torch.Tensor:
    a, b, c = coefficients
    rows, columns = x.shape[-2:]
    # Loads of 16 bytes need aligned rows; rows and columns of zeros stay zero, and a copy for the normalisation is made anyway.
    padded_x = F.pad(x, (0, -columns % ALIGNMENT, 0, -rows % ALIGNMENT))
    result = iterate(padded_x, gram_polynomial, steps=steps, coefficients=(a, b, c), eps=eps, dtype=dtype)
    return result[:, :rows, :columns].contiguous()


@_newton_schulz.register_fake
def _(x, steps, coefficients, eps, dtype):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def newton_schulz(
    x_BMN: torch.Tensor, *, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """See `hope_kernels.newton_schulz`: the operator `hope_kernels::newton_schulz`, without autograd."""
    return _newton_schulz(x_BMN, steps, list(coefficients), eps, dtype)
