"""A scan as a run of segments, and recomputation between saved states.

`in_segments` is the loop that both scans share: cut the tokens, carry the state from segment to segment, join the outputs. Where it is
asked to, backward keeps only the inputs of a segment and replays it, so memory does not grow inside it: like activation checkpointing,
without its bookkeeping for every saved tensor; first-order gradients only.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from hope_kernels.rule import ChunkMasks

Tensors = tuple[torch.Tensor, ...]


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


class Segment(Protocol):
    """Whole chunks of length `size`: from the tokens' tensors, the carried ones and the shared ones to (outputs, carried ones).

    writes_last: whether the state after the last chunk is read by anyone.
    """

    def __call__(
        self, tokens: Tensors, carried: Tensors, shared: Tensors, *, size: int, masks: ChunkMasks, writes_last: bool
    ) -> tuple[Tensors, Tensors]: ...


def segments(num_tokens: int, chunk: int, save_every: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into (first token, end token, chunk length): runs of whole chunks, then a shorter last chunk if there is one."""
    whole = num_tokens - num_tokens % chunk
    step = chunk * max(1, save_every // chunk)
    cuts = [(first, min(first + step, whole), chunk) for first in range(0, whole, step)]
    return cuts + ([(whole, num_tokens, num_tokens - whole)] if whole < num_tokens else [])


def in_segments(
    segment: Segment,
    tokens: Tensors,
    carried: Tensors,
    shared: Tensors,
    *,
    chunk: int,
    save_every: int,
    masks: ChunkMasks,
    keep_state: bool,
    recompute: bool,
) -> tuple[list[torch.Tensor], Tensors]:
    """(outputs joined along the tokens, the carried tensors after the last chunk) of a scan over tokens [B, H, T, ...].

    shared: what every segment gets whole. save_every: tokens of a segment; recompute: keep only its inputs for the backward pass.
    """
    cuts = segments(tokens[0].shape[2], chunk, save_every)
    split = [t.split([end - first for first, end, _ in cuts], 2) for t in tokens]
    outputs: list[Tensors] = []
    for window, (first, end, size) in zip(zip(*split, strict=True), cuts, strict=True):
        settings = {"size": size, "masks": masks.window(slice(first // chunk, -(-end // chunk)))}
        settings["writes_last"] = keep_state or end < cuts[-1][1]
        counts = len(window), len(window) + len(carried)

        def run(*tensors, counts=counts, settings=settings):
            found, after = segment(tensors[: counts[0]], tensors[counts[0] : counts[1]], tensors[counts[1] :], **settings)
            return *found, *after

        arguments = (*window, *carried, *shared)
        results = replay(run, *arguments) if recompute and len(cuts) > 1 else run(*arguments)
        outputs.append(results[: -len(carried)])
        carried = results[-len(carried) :]
    return [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)], carried


def take(kept: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Remove the last entries of a list and return them in their order."""
    found = kept[-count:]
    del kept[-count:]
    return found
