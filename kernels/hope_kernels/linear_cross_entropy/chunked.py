"""Head and loss block by block of the vocabulary, with the backward pass by hand.

Forward: for every block of rows of W the logits of all tokens, reduced at once to a logsumexp and the target's logit; the logsumexps of
the blocks are joined at the end. Backward: the same products again, turned in place into the gradient of the logits

    G_nv = d_lse_n exp(l_nv - lse_n) + d_at_target_n [v = target_n]

from which d_W of the block is G^T h, written once, and d_h gains G W. The pointwise steps are arguments: plain torch here, kernels in
triton_.py. Legend: N tokens, D width, V rows of W, C columns of a block of logits.
"""

from collections.abc import Callable, Iterator

import torch

MIB = 2**20
CPU_BLOCK_BYTES = 8 * MIB
"""Fastest on a CPU core of those measured (1 to 64 MiB, README.md): the block stays near the cache between its passes."""
BLOCK_BYTES = 32 * MIB
"""On a GPU: inside the 50 MB second-level cache of an H200, and still hundreds of columns at tens of thousands of tokens."""
LEAST_COLUMNS = 128

Statistics = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits [N, C], targets [N] counted from the block's first column) -> (logsumexp, target's logit or 0), [N]; may destroy the logits."""
Gradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, targets, lse, d_lse, d_at_target) -> G in the dtype of the logits; may be written in their place."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first row of W, those rows, logits [N, C]) of every block; all logits lie in the same memory, one after the other."""
    tokens, vocabulary = len(hidden_ND), len(weight_VD)
    limit = CPU_BLOCK_BYTES if hidden_ND.device.type == "cpu" else BLOCK_BYTES
    columns = limit // (tokens * hidden_ND.element_size()) // LEAST_COLUMNS * LEAST_COLUMNS
    columns = min(max(columns, LEAST_COLUMNS), vocabulary)
    memory = hidden_ND.new_empty(tokens * columns)
    for first in range(0, vocabulary, columns):
        rows_CD = weight_VD[first : first + columns]
        logits_NC = memory[: tokens * len(rows_CD)].view(tokens, len(rows_CD))
        yield first, rows_CD, torch.mm(hidden_ND, rows_CD.t(), out=logits_NC)


def forward_blocks(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, *, statistics: Statistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse, target's logit), [N], of all blocks."""
    found = [statistics(logits_NC, targets_N - first) for first, _, logits_NC in _blocks(hidden_ND, weight_VD)]
    lse, at_target = (torch.stack(parts) for parts in zip(*found, strict=True))
    return lse.logsumexp(0), at_target.sum(0)


def backward_blocks(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    lse_N: torch.Tensor,
    d_lse_N: torch.Tensor,
    d_at_target_N: torch.Tensor,
    *,
    gradient: Gradient,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_hidden [N, D], d_weight [V, D]) in the dtypes of the two."""
    d_weight_VD = torch.empty_like(weight_VD)
    # fp32 beside bf16: each block's G W is rounded to bf16 once, by its product; the sum over the blocks is not rounded again.
    d_hidden_ND = torch.zeros_like(hidden_ND, dtype=accumulation_dtype(hidden_ND.dtype))
    for first, rows_CD, logits_NC in _blocks(hidden_ND, weight_VD):
        g_NC = gradient(logits_NC, targets_N - first, lse_N, d_lse_N, d_at_target_N)
        torch.mm(g_NC.t(), hidden_ND, out=d_weight_VD[first : first + len(rows_CD)])
        if d_hidden_ND.dtype == g_NC.dtype:
            torch.addmm(d_hidden_ND, g_NC, rows_CD, out=d_hidden_ND)
        else:
            d_hidden_ND += g_NC @ rows_CD
    return d_hidden_ND.to(hidden_ND.dtype), d_weight_VD


def _target(targets_N: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of the target as an index [N, 1], whether it lies in the block [N])."""
    inside_N = (targets_N >= 0) & (targets_N < columns)
    return torch.where(inside_N, targets_N, 0)[:, None], inside_N


def _statistics(logits_NC: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NC = logits_NC.to(accumulation_dtype(logits_NC.dtype))
    column_N1, inside_N = _target(targets_N, logits_NC.shape[1])
    at_target_N = torch.where(inside_N, logits_NC.gather(1, column_N1).squeeze(1), 0.0)
    highest_N1 = logits_NC.amax(1, keepdim=True)
    total_N = logits_NC.sub_(highest_N1).exp_().sum(1)
    return total_N.log_().add_(highest_N1.squeeze(1)), at_target_N


def _gradient(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, lse_N: torch.Tensor, d_lse_N: torch.Tensor, d_at_target_N: torch.Tensor
) -> torch.Tensor:
    g_NC = logits_NC.to(accumulation_dtype(logits_NC.dtype)).sub_(lse_N[:, None]).exp_().mul_(d_lse_N[:, None])
    column_N1, inside_N = _target(targets_N, g_NC.shape[1])
    g_NC.scatter_add_(1, column_N1, torch.where(inside_N, d_at_target_N, 0.0)[:, None])
    return g_NC.to(logits_NC.dtype)


class _VocabularyStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        lse_N, at_target_N = forward_blocks(hidden_ND, weight_VD, targets_N, statistics=_statistics)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        return lse_N, at_target_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_lse_N, d_at_target_N):
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        return *backward_blocks(hidden_ND, weight_VD, targets_N, lse_N, d_lse_N, d_at_target_N, gradient=_gradient), None


def vocabulary_statistics(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's `vocabulary_statistics`."""
    return _VocabularyStatistics.apply(hidden_ND, weight_VD, targets_N)
