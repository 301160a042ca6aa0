"""The specification: all logits at once, gradients by autograd."""

import torch
import torch.nn.functional as F


def vocabulary_statistics(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's `vocabulary_statistics`."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    inside_N = (targets_N >= 0) & (targets_N < len(weight_VD))
    at_target_N = logits_NV.gather(1, torch.where(inside_N, targets_N, 0)[:, None]).squeeze(1)
    return logits_NV.logsumexp(1), torch.where(inside_N, at_target_N, 0.0)
