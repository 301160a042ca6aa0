"""The language model's head and loss in one: logits = h W^T, loss = logsumexp(logits) - logits[target], without the logits in memory.

    losses_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N)

`reference` holds all logits, `chunked` one block of the vocabulary at a time in plain torch, `triton` the same with fused kernels between
the matrix products. Where the vocabulary is divided over ranks, each calls `vocabulary_statistics` on its own rows of W; the joint
logsumexp is a reduction of one number a token that this package leaves to its caller, and so is the sum of the gradients of h.
Legend: N tokens, D width, V vocabulary (this rank's).
"""

import functools

import torch

from hope_kernels.backend import choose, triton_obstacle
from hope_kernels.linear_cross_entropy import chunked, reference


def _triton(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from hope_kernels.linear_cross_entropy import triton_

    return triton_.vocabulary_statistics(hidden_ND, weight_VD, targets_N)


BACKENDS = {"chunked": chunked.vocabulary_statistics, "reference": reference.vocabulary_statistics, "triton": _triton}


@functools.cache
def head_backend(backend: str, *, device: torch.device) -> str:
    """The implementation that `backend` means on a device.

    "auto" is Triton's on a GPU that has it, else plain torch, also where Triton's interpreter could run the kernels on a CPU. Raises
    ValueError for an unknown backend, and for a forced one that cannot run there.
    """
    if backend == "auto" and device.type != "cuda":
        return "chunked"
    return choose("linear_cross_entropy", backend=backend, obstacle=triton_obstacle(device))


def vocabulary_statistics(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logsumexp of a token's logits h W^T, its target's logit), both [N], fp32 or float64 where h is.

    hidden, weight: fp32, bf16 or (not with Triton) float64, the same. targets: int64, counted from the first row of weight; the logit of a
    target outside [0, V) is given as 0, without a gradient. Gradients of first order, for any upstream gradient of each number.
    ValueError as `head_backend`.
    """
    return BACKENDS[head_backend(backend, device=hidden_ND.device)](hidden_ND, weight_VD, targets_N)


def cross_entropy(lse_N: torch.Tensor, at_target_N: torch.Tensor, targets_N: torch.Tensor, *, vocabulary: int) -> torch.Tensor:
    """Loss of every token in nats, [N], from its statistics over the whole vocabulary; 0 where the target is not in [0, vocabulary)."""
    counted_N = (targets_N >= 0) & (targets_N < vocabulary)
    return torch.where(counted_N, lse_N - at_target_N, 0.0)


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Cross-entropy of every token in nats, [N]; arguments and errors as `vocabulary_statistics`.

    A target outside [0, V), such as -100, is ignored: loss and gradient 0.
    """
    lse_N, at_target_N = vocabulary_statistics(hidden_ND, weight_VD, targets_N, backend=backend)
    return cross_entropy(lse_N, at_target_N, targets_N, vocabulary=len(weight_VD))
