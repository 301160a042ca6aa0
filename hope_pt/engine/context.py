"""Context parallelism: a mixer's core when every rank of a group holds one contiguous shard of the sequence.

Two ways, each a `Parts.run_core` (hope_pt.nn.parts):

* `by_heads`: an all-to-all turns a shard of the sequence for all heads into the whole sequence for a share of the heads, and back. The core
  runs unchanged on its share; its parameters are held whole, so every rank's gradient is that of its own heads and the data-parallel sum
  completes it. Communication: two all-to-alls forward, two backward, of the projections and the outputs.
* `by_state`: rank r reads its shard from the state that rank r - 1 ends with, and hands its own on; backward passes the gradient of the
  state the other way, so the gradient over the whole sequence is exact. Nothing but states travels, but the scans of a row run one rank
  after the other; the rows of a micro-batch follow each other in waves, so that of W waves C - 1 are waited for and not (C - 1) W.

Legend: B batch, T tokens of a shard, C ranks of the group, H heads, P features of one head.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor, nn
from torch.func import functional_call

from hope_pt.nn.layout import Layout
from hope_pt.nn.state import LayerState


def run_core(mode: str, group: dist.ProcessGroup) -> Callable[..., Any]:
    """How a core is called in context-parallel `mode`; in a group of one rank it is just called."""
    if group.size() == 1:
        return nn.Module.__call__
    return functools.partial({"heads": by_heads, "state": by_state}[mode], group=group)


def by_heads(
    core: nn.Module,
    projected_BTP: Tensor,
    *,
    state: LayerState | None,
    layout: Layout | None,
    keep_state: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, LayerState | None]:
    """(y [B, T, H * K] of this shard, the state of this rank's heads or None). layout: of the whole sequence."""
    parameters = {name: parameter.chunk(group.size())[group.rank()] for name, parameter in core.named_parameters()}
    options = {"state": state, "layout": layout, "keep_state": keep_state}
    y, state = functional_call(core, parameters, (_to_heads(projected_BTP, group),), options)
    return _to_sequence(y, group), state


def _to_heads(x_BTF: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, H * P], a shard of the sequence -> [B, C * T, H / C * P]."""
    ranks = group.size()
    parts = x_BTF.unflatten(-1, (ranks, -1)).permute(2, 0, 1, 3).contiguous()
    return all_to_all(group, parts).permute(1, 0, 2, 3).flatten(1, 2)


def _to_sequence(x_BTF: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `_to_heads`."""
    ranks = group.size()
    parts = x_BTF.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    return all_to_all(group, parts).permute(1, 2, 0, 3).flatten(2)


def by_state(
    core: nn.Module,
    projected_BTP: Tensor,
    *,
    state: LayerState | None,
    layout: Layout | None,
    keep_state: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, None]:
    """(y [B, T, H * K] of this shard, None). layout: of the shard, continued from the tokens before it."""
    assert layout is not None, "a continued shard has a layout"
    waves = projected_BTP.split(-(-len(projected_BTP) // group.size()))
    layouts = layout.split(len(waves[0]))
    return torch.cat([_wave(core, x, layout=part, group=group) for x, part in zip(waves, layouts, strict=True)]), None


def _wave(core: Any, x_BTP: Tensor, *, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """Some rows of `by_state`. Backward comes to the waves of all ranks in the same order, the last one first."""
    batch, length = x_BTP.shape[:2]
    rank, last = group.rank(), group.size() - 1
    state = None
    if rank > 0:
        like = core.init_state(batch, dtype=x_BTP.dtype, device=x_BTP.device, past=rank * length)
        names = sorted(like)
        state = dict(zip(names, _Receive.apply(x_BTP, group, *(like[name].detach() for name in names)), strict=True))
    y, state = core(x_BTP, state=state, layout=layout, keep_state=rank < last)
    return _Send.apply(y, group, *(state[name] for name in sorted(state))) if rank < last else y


class _Receive(torch.autograd.Function):
    """Tensors like the given ones from the previous rank; backward gives it their gradients.

    The first argument only ties the result to the graph.
    """

    @staticmethod
    def forward(ctx, anchor, group, *like):
        ctx.group = group
        received = tuple(_receive(t, group, step=-1) for t in like)
        ctx.mark_non_differentiable(*(t for t in received if not t.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx, *grads):
        for grad in grads:
            if grad.is_floating_point():
                _send(grad, ctx.group, step=-1)
        return None, None, *(None for _ in grads)


class _Send(torch.autograd.Function):
    """Hand tensors to the next rank; backward takes their gradients from it. y is passed through, so that backward is sure to come by."""

    @staticmethod
    def forward(ctx, y, group, *tensors):
        ctx.group, ctx.like = group, [t.to("meta") for t in tensors]
        ctx.device = y.device
        for tensor in tensors:
            _send(tensor, group, step=1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, d_y):
        like = [torch.empty_like(t, device=ctx.device) if t.is_floating_point() else None for t in ctx.like]
        return d_y, None, *(None if t is None else _receive(t, ctx.group, step=1) for t in like)


def _send(tensor: Tensor, group: dist.ProcessGroup, *, step: int) -> None:
    dist.send(_as_bytes(tensor.contiguous()), group=group, group_dst=group.rank() + step)


def _receive(like: Tensor, group: dist.ProcessGroup, *, step: int) -> Tensor:
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(_as_bytes(result), group=group, group_src=group.rank() + step)
    return result


def _as_bytes(tensor: Tensor) -> Tensor:
    """Booleans as bytes: not every backend sends them."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
