"""Bytes that one rank sends, counted from the collectives and messages that really run, by mesh axis.

Every collective of torch.distributed passes through an operator of the name space `c10d`, whoever calls it and under whatever alias, so
a dispatch mode sees all of them with their tensors and their group. What a collective sends is counted as ring algorithms do it,
with n ranks in the group: an all-reduce 2 (n - 1) / n of its tensor, an all-gather and a reduce-scatter (n - 1) / n of the whole one, an
all-to-all (n - 1) / n of its input, a message all of it; receiving counts nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hope_pt.engine import Plan

_SHARE: dict[str, Callable[[int, int], float]] = {
    "allreduce_": lambda size, n: 2 * size * (n - 1) / n,
    "allreduce_coalesced_": lambda size, n: 2 * size * (n - 1) / n,
    "_allgather_base_": lambda size, n: size * (n - 1),
    "allgather_into_tensor_coalesced_": lambda size, n: size * (n - 1),
    "_reduce_scatter_base_": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_tensor_coalesced_": lambda size, n: size * (n - 1) / n,
    "alltoall_base_": lambda size, n: size * (n - 1) / n,
    "send": lambda size, n: size,
    "broadcast_": lambda size, n: size * (n - 1) / n,
    "recv_": lambda size, n: 0,
    "recv_any_source_": lambda size, n: 0,
    "barrier": lambda size, n: 0,
}
"""Operator -> bytes sent, of the bytes of its input and the number of ranks."""
_INPUT_SECOND = {
    "_allgather_base_",
    "allgather_into_tensor_coalesced_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "alltoall_base_",
}
"""Operators whose first tensors are their outputs."""


class CommunicationCounter(TorchDispatchMode):
    """Within it, `sent` has the bytes that this rank sends, by kind.

    Kinds: tensor, context, pipeline, embedding (the two copies of a tied one), gradients and parameters (over data-parallel ranks), other.
    An operator that it does not know raises KeyError.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self.sent: Counter[str] = Counter()
        groups = plan.groups
        self._kinds = {
            groups.tensor.group_name: "tensor",
            groups.context.group_name: "context",
            groups.pipeline.group_name: "pipeline",
            groups.data.group_name: "data",
            groups.data_context.group_name: "data",
        }
        if isinstance(groups.megatron.embd, dist.ProcessGroup):
            self._kinds.setdefault(groups.megatron.embd.group_name, "embedding")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs the operation and counts it where it is a collective."""
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        tensors = args[1] if name in _INPUT_SECOND else args[0]
        size = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
        kind = self._kinds.get(group.group_name, "other")
        if kind == "data":
            kind = "parameters" if "allgather" in name or name == "broadcast_" else "gradients"
        if kind == "other" and name == "send":
            kind = "pipeline"  # between two stages megatron sends one way in the group of all ranks
        self.sent[kind] += round(_SHARE[name](size, group.size()))


def _is_group(argument: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(argument._type())
