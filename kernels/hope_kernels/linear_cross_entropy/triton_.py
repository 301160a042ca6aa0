"""The op `hope_kernels::vocabulary_statistics`: chunked.py's blocks with one kernel over each block of logits, forward and backward.

The matrix products are cuBLAS's. What a kernel would gain by computing them itself is the traffic of a block of logits, which lies in the
second-level cache. Both kernels: one program for each token, which passes over its row of the block once.
"""

import torch
import triton
import triton.language as tl

from hope_kernels.linear_cross_entropy import chunked
from hope_kernels.triton_support import operator

BLOCK = 1024
"""Columns that a program holds at a time: with 4 warps 8 a thread, a 16-byte load of bf16."""
WARPS = 4


@triton.jit
def statistics_kernel(logits_ptr, targets_ptr, lse_ptr, at_target_ptr, columns, BLOCK: tl.constexpr):
    """Lse, at_target [N] fp32 of logits [N, columns]: one pass, in which the sum of exponentials is rescaled where the maximum rises."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    target = tl.load(targets_ptr + row)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, columns, BLOCK, num_stages=1):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    inside = (target >= 0) & (target < columns)
    tl.store(lse_ptr + row, highest + tl.log(total))
    tl.store(at_target_ptr + row, tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(logits_ptr, targets_ptr, lse_ptr, d_lse_ptr, d_at_target_ptr, columns, BLOCK: tl.constexpr):
    """Logits [N, columns] become their gradient, in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    d_lse = tl.load(d_lse_ptr + row)
    d_at_target = tl.load(d_at_target_ptr + row)
    for first in tl.range(0, columns, BLOCK, num_stages=1):
        column = first + tl.arange(0, BLOCK)
        within = column < columns
        x = tl.load(logits_ptr + column, mask=within, other=0.0).to(tl.float32)
        g = d_lse * tl.exp(x - lse) + tl.where(column == target, d_at_target, 0.0)
        tl.store(logits_ptr + column, g.to(logits_ptr.dtype.element_ty), mask=within)


def _statistics(logits_NC: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert logits_NC.is_contiguous() and targets_N.is_contiguous()
    lse_N, at_target_N = (torch.empty_like(targets_N, dtype=torch.float32) for _ in range(2))
    statistics_kernel[(len(logits_NC),)](logits_NC, targets_N, lse_N, at_target_N, logits_NC.shape[1], BLOCK=BLOCK, num_warps=WARPS)
    return lse_N, at_target_N


def _gradient(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, lse_N: torch.Tensor, d_lse_N: torch.Tensor, d_at_target_N: torch.Tensor
) -> torch.Tensor:
    per_token = (targets_N, lse_N, d_lse_N, d_at_target_N)
    assert logits_NC.is_contiguous() and all(t.is_contiguous() for t in per_token)
    gradient_kernel[(len(logits_NC),)](logits_NC, *per_token, logits_NC.shape[1], BLOCK=BLOCK, num_warps=WARPS)
    return logits_NC


@operator("vocabulary_statistics")
def _op(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return chunked.forward_blocks(hidden_ND, weight_VD, targets_N, statistics=_statistics)


@_op.register_fake
def _(hidden_ND, weight_VD, targets_N):
    return tuple(hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))


@operator("vocabulary_statistics_backward")
def _backward_op(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    lse_N: torch.Tensor,
    d_lse_N: torch.Tensor,
    d_at_target_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    upstream = (d_lse_N.contiguous(), d_at_target_N.contiguous())
    return chunked.backward_blocks(hidden_ND, weight_VD, targets_N, lse_N, *upstream, gradient=_gradient)


@_backward_op.register_fake
def _(hidden_ND, weight_VD, targets_N, lse_N, d_lse_N, d_at_target_N):
    return torch.empty_like(hidden_ND), torch.empty_like(weight_VD)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


def _backward(ctx, d_lse_N, d_at_target_N):
    return *_backward_op(*ctx.saved_tensors, d_lse_N, d_at_target_N), None


_op.register_autograd(_backward, setup_context=_save)


def vocabulary_statistics(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's `vocabulary_statistics`; fp32 and bf16."""
    return _op(hidden_ND, weight_VD, targets_N)
