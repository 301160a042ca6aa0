"""Recomputation between saved states: backward keeps the inputs of a segment and replays it, so memory does not grow inside it.

Like activation checkpointing, without its bookkeeping for every saved tensor; first-order gradients only.
"""

from collections.abc import Callable

import torch


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in inputs)


def replay(function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`function(*inputs)`, keeping only `inputs` for the backward pass.

    function: pure, from tensors to a tuple of tensors; whatever else it closes over must not need a gradient.
    """
    return _Replay.apply(function, *inputs)
