"""What one rank's optimizer holds of a parameter, and where in the model the parameter stands: the terms of `guards` and `measure`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.names import level_of
from hope_pt.optim.matrices import Matrices

Total = Callable[[Tensor], None]
"""Adds a tensor over all ranks of the job, in place; every rank calls it in the same order."""

# Elements whose numbers are in memory at once: what stays in a cache, or what fills a GPU.
_CPU_RUN, _GPU_RUN = 1 << 16, 1 << 24


@dataclass(frozen=True)
class Held:
    """What this rank's optimizer updates of one parameter.

    main: fp32, elements first to first + numel of a flattened shard of shape `shard_shape`; the shard is part `index` of `count` equal
    ones of the whole along `axis` (None: it is the whole). counted: whether sums over all ranks take this rank's values; every element is
    counted by exactly one rank. matrices: how this shard is part of whole matrices, where its rule orthogonalises.
    """

    name: str
    main: Tensor
    shard_shape: tuple[int, ...]
    first: int = 0
    axis: int | None = None
    index: int = 0
    count: int = 1
    counted: bool = True
    matrices: Matrices | None = None

    def runs(self, *values: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(element numbers in the whole parameter [n] int64, the same elements of each given tensor [n] fp32) in runs of bounded size."""
        size = _GPU_RUN if self.main.is_cuda else _CPU_RUN
        flat = [value.reshape(-1) for value in values]
        for begin in range(0, self.main.numel(), size):
            end = min(begin + size, self.main.numel())
            local = torch.arange(self.first + begin, self.first + end, device=self.main.device)
            yield self._whole(local), [value[begin:end].float() for value in flat]

    def _whole(self, local: Tensor) -> Tensor:
        """Row-major numbers in the whole of the elements with these row-major numbers in the shard."""
        if self.axis is None:
            return local
        run = 1
        for size in self.shard_shape[self.axis :]:
            run *= size
        return local + local // run * (run * (self.count - 1)) + self.index * run


def period_of(name: str, model: ModelConfig) -> int:
    """Optimizer steps between two updates of a parameter."""
    place = level_of(name)
    return model.cms.period(place[0], block=place[1]) if place else 1


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two tensors, summed in fp64: the order of ranks and shards changes nothing that fp32 can show."""
    return (a * b).sum(dtype=torch.float64)
