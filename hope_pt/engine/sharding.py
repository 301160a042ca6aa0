"""How the tensors of a run are divided over tensor-parallel ranks, and what one rank contributes to a checkpoint."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's part of one named tensor: part `index` of `count` equal ones along `axis`, or all of it (axis None).

    name: "model.<name>" or "optim.<name>.<key>" with HopeLM's parameter names, whatever the layout.
    """

    name: str
    data: Tensor
    axis: int | None = None
    index: int = 0
    count: int = 1

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(size * (self.count if axis == self.axis else 1) for axis, size in enumerate(self.data.shape))


def shard_axis(name: str) -> int | None:
    """Axis along which the parameter `name` (a HopeLM name) is divided over tensor-parallel ranks, None where every rank holds it whole.

    Column-parallel matrices and the vocabulary are cut by output rows, row-parallel matrices by input columns, and everything in a core is
    head-first.
    """
    if name.endswith(("out_proj.weight", "w_down.weight")):
        return 1
    if ".core." in name or name.endswith(("in_proj.weight", "w_gate.weight", "w_up.weight")) or name in ("embedding.weight", "head.weight"):
        return 0
    return None


def slice_of(full: Tensor, *, axis: int | None, index: int, count: int) -> Tensor:
    """Part `index` of `count` equal parts of `full` along `axis` (a view), or `full` where axis is None."""
    return full if axis is None else full.chunk(count, axis)[index]
