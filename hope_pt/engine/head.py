"""The head and the loss of the last pipeline stage, its vocabulary divided over tensor-parallel ranks, without the logits in memory.

Each rank holds V / n rows of W and runs `hope_kernels.linear_cross_entropy` on all tokens. Two reductions, of one and of two
fp32 numbers a token, make of the ranks' statistics those of the whole vocabulary:

    lse = m + log sum_r exp(lse_r - m), m = max_r lse_r;     the target's logit is on one rank, the others add 0

so the gradient of lse is, on rank r, exp(lse_r - lse) times that of lse_r. The gradient of the hidden states is summed over the ranks:
all-reduced, or with sequence parallelism reduce-scattered, after their gathering along the sequence.
Legend: B rows of a micro-batch, T tokens of this context-parallel rank, D width, N = T B.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from hope_kernels.linear_cross_entropy import cross_entropy, vocabulary_statistics


class VocabularyHead(nn.Module):
    """Stands in megatron's model where its output layer was, with that layer's weight.

    A module of its own, called as one: megatron waits for the overlapped gather of a weight when a module that holds it is called.
    """

    def __init__(self, weight: nn.Parameter | None, *, group: dist.ProcessGroup, sequence_parallel: bool, backend: str):
        super().__init__()
        self.weight = weight
        self._group = group
        self._sequence_parallel = sequence_parallel
        self._backend = backend

    def forward(self, hidden_TBD: Tensor, targets_BT: Tensor, *, tied_weight: Tensor | None = None) -> Tensor:
        """Loss of every token in nats, [B, T] fp32, the same on every rank; 0 for a target that is not in the vocabulary.

        hidden: [T / n, B, D] with sequence parallelism. tied_weight: the embedding's, where this head has none of its own.
        """
        weight_VD = self.weight if tied_weight is None else tied_weight
        assert weight_VD is not None
        ranks = self._group.size()
        if self._sequence_parallel:
            hidden_TBD = gather_from_sequence_parallel_region(hidden_TBD, group=self._group)
        elif ranks > 1:
            hidden_TBD = copy_to_tensor_model_parallel_region(hidden_TBD, group=self._group)
        targets_TB = targets_BT.t()
        targets_N = targets_TB.reshape(-1)
        own_N = targets_N - self._group.rank() * len(weight_VD)
        lse_N, at_target_N = vocabulary_statistics(hidden_TBD.flatten(0, 1), weight_VD, own_N, backend=self._backend)
        if ranks > 1:
            lse_N, at_target_N = _Joined.apply(lse_N, at_target_N, self._group)
        losses_N = cross_entropy(lse_N, at_target_N, targets_N, vocabulary=ranks * len(weight_VD))
        return losses_N.view_as(targets_TB).t().contiguous()


class _Joined(torch.autograd.Function):
    """Statistics of the whole vocabulary from every rank's own. All ranks go on with the same numbers, so gradients are not summed."""

    @staticmethod
    def forward(ctx, lse_N, at_target_N, group):
        highest_N = lse_N.clone()
        dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
        sums_2N = torch.stack([(lse_N - highest_N).exp_(), at_target_N])
        dist.all_reduce(sums_2N, group=group)
        joined_N = sums_2N[0].log() + highest_N
        ctx.save_for_backward((lse_N - joined_N).exp_())
        return joined_N, sums_2N[1]

    @staticmethod
    def backward(ctx, d_lse_N, d_at_target_N):
        (share_N,) = ctx.saved_tensors
        return d_lse_N * share_N, d_at_target_N, None
