"""A parameter as a batch of matrices, which is what the deep rules update (SPEC 4).

    locals [N, *shape] -> whole matrices [M, R, C] -> function -> locals

N parameters of one shape are updated together. A 2-D parameter is one matrix; a stack [..., R, C], such as the initial state of the
memories of all heads, is a matrix for every leading index; the input projection of a mixer, whose rows are interleaved per head as
(q, k, v, ...), is a matrix for every stream. `Matrices` is the seam to tensor parallelism: everything that needs more than single
elements goes through `Matrices.apply`, which in one process rearranges and in an engine gathers what the ranks have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_pt.config.schema import ModelConfig

_ROW_PARALLEL = ("out_proj.weight", "w_down.weight")


@dataclass(frozen=True)
class View:
    """How a parameter is a batch of matrices. Shapes are read from the tensors, so the same view serves a parameter and its shard.

    axis: the axis of the parameter along which tensor-parallel ranks divide it. streams: rows of one head in each stream, where the rows
    are interleaved per head, [sum over heads of sum(streams), C]; empty for a stack [..., R, C].
    """

    axis: int
    streams: tuple[int, ...] = ()

    def to_matrices(self, x: Tensor) -> Tensor:
        """[N, *shape] -> [M, R, C], M = N times the matrices of a parameter. A stream with fewer rows than others is filled with zeros."""
        if not self.streams:
            return x.reshape(-1, *x.shape[-2:])
        heads = self._heads(x.shape)
        rows = max(self.streams)
        parts = x.reshape(len(x), heads, -1, x.shape[-1]).split(self.streams, 2)
        return torch.stack([F.pad(part, (0, 0, 0, rows - part.shape[2])) for part in parts], 1).reshape(-1, heads * rows, x.shape[-1])

    def from_matrices(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse; shape: [N, *shape] of the tensor that `to_matrices` took. The zeros that it added are dropped."""
        if not self.streams:
            return matrices.reshape(tuple(shape))
        parts = matrices.view(shape[0], len(self.streams), self._heads(shape), -1, shape[-1]).unbind(1)
        return torch.cat([part[:, :, :rows] for part, rows in zip(parts, self.streams, strict=True)], 2).reshape(tuple(shape))

    def lead(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Leading sizes of the matrices of one parameter of `shape` (without N): () for one matrix, [H] or [H, S] for stacks."""
        return (len(self.streams),) if self.streams else tuple(shape[:-2])

    def rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Rows of every matrix of one parameter of `shape` (without N), without those filled with zeros."""
        if not self.streams:
            count = 1
            for size in shape[:-2]:
                count *= size
            return (shape[-2],) * count
        heads = shape[0] // sum(self.streams)
        return tuple(heads * rows for rows in self.streams)

    def is_local(self, ndim: int) -> bool:
        """Whether a tensor-parallel rank holds whole matrices of a parameter with `ndim` dimensions: a stack divided by head."""
        return not self.streams and self.axis < ndim - 2

    def _heads(self, shape: Sequence[int]) -> int:
        return shape[1] // sum(self.streams)


def view_of(name: str, *, config: ModelConfig, split: bool = True) -> View:
    """The view of a matrix parameter with canonical name `name`. split: take the streams of an input projection apart."""
    axis = 1 if name.endswith(_ROW_PARALLEL) else 0
    if not (split and name.endswith("in_proj.weight")):
        return View(axis)
    if config.mixer == "attention":
        return View(axis, (config.head_width,) * 3)
    logit = (1,) if config.titans.momentum == "titans" else ()
    return View(axis, (config.head_width,) * 4 + logit)


Function = Callable[..., tuple[Tensor, ...]]


class Matrices:
    """Stacks of parameters of one view, whole in this process. An engine's subclass gathers the shards of the tensor-parallel ranks."""

    def __init__(self, view: View):
        self.view = view

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole parameter of which `shape` is this rank's part."""
        return tuple(shape)

    def apply(
        self, function: Function, *tensors: Tensor, constants: Sequence[Tensor] = (), own: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """Run `function` on whole matrices; what it returns comes back in the form of the tensors.

        tensors: [N, *shape] each, this rank's parts of N parameters with M matrices. constants, own: tensors [M, ...] that every rank has.
        function: takes all of them, the tensors as [M, R, C]; it treats every matrix on its own, and may be given some of the M only. It
        returns a tuple of some [M, R, C], then the new values of `own`, which come back as they are.
        """
        results = function(*[self.view.to_matrices(x) for x in tensors], *constants, *own)
        count = len(results) - len(own)
        return *(self.view.from_matrices(x, tensors[0].shape) for x in results[:count]), *results[count:]

    def rows(self, x: Tensor) -> Tensor:
        """Rows of every whole matrix of the stack x [N, *shape], [M, 1, 1] of x's dtype and device: one of the constants of `apply`."""
        rows = self.view.rows(self.whole_shape(x.shape[1:]))
        if len(set(rows)) == 1:
            return x.new_full((len(x) * len(rows), 1, 1), rows[0])
        # Filled on the device: a copy from a list would wait for it.
        return torch.cat([x.new_full((1, 1, 1), count) for count in rows]).repeat(len(x), 1, 1)
