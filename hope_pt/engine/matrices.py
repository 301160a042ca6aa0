"""Whole matrices of a rule when tensor-parallel ranks hold slices of them (SPEC 4: Newton-Schulz acts on the whole matrix).

A stack of N parameters of one shape lies on n ranks as N slices each. The ranks share the work: one all-to-all gives every rank all slices
of its share of the parameters, it computes on their whole matrices, and a second one returns each slice of the results to its rank.

    [N, *local] --all-to-all--> [N / n, *whole] --view--> [M / n, R, C] --function--> [M / n, R, C] --view, all-to-all--> [N, *local]

Each rank sends (n - 1) / n of its slices for every argument and for every result, and computes 1 / n of the whole. An all-gather would send
n / 2 times as much for one argument and one result, and compute everything n times. The function sees the same matrices in any layout.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hope_pt.optim.matrices import Function, Matrices, View


def matrices_of(view: View, *, ndim: int, group: dist.ProcessGroup) -> Matrices:
    """Stacks of parameters with `ndim` dimensions that the ranks of `group` hold in equal slices along the view's axis.

    A rank that holds whole matrices anyway (a stack divided by head) needs nobody else.
    """
    return Matrices(view) if group.size() == 1 or view.is_local(ndim) else ShardedMatrices(view, group=group)


class ShardedMatrices(Matrices):
    """Matrices of which every rank of `group` has a slice. `apply` is a collective of the group, with the same N on every rank."""

    def __init__(self, view: View, *, group: dist.ProcessGroup):
        super().__init__(view)
        self._group = group

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Matrices.whole_shape`."""
        return tuple(size * (self._group.size() if axis == self.view.axis else 1) for axis, size in enumerate(shape))

    def apply(
        self, function: Function, *tensors: Tensor, constants: Sequence[Tensor] = (), own: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """See `Matrices.apply`."""
        ranks, count = self._group.size(), len(tensors[0])
        shares = [count // ranks + (rank < count % ranks) for rank in range(ranks)]
        mine = shares[self._group.rank()]
        wholes = self._to_shares(torch.stack(tensors, 1), shares)
        extra = [x.view(count, -1, *x.shape[1:]).split(shares)[self._group.rank()].flatten(0, 1) for x in (*constants, *own)]
        if not mine:
            # Nothing to do here: one parameter of zeros in place of none, which not every function can take.
            wholes, extra = wholes.new_zeros(1, *wholes.shape[1:]), [x[: len(x) // count] for x in (*constants, *own)]
        results = function(*[self.view.to_matrices(x) for x in wholes.unbind(1)], *extra)
        kept = len(results) - len(own)
        shape = (len(wholes), *wholes.shape[2:])
        parts = self._to_slices(torch.stack([self.view.from_matrices(x, shape) for x in results[:kept]], 1)[:mine], shares)
        return *parts.unbind(1), *(self._gather(new, shares, like=old) for new, old in zip(results[kept:], own, strict=True))

    def _to_shares(self, local: Tensor, shares: Sequence[int]) -> Tensor:
        """Slices [N, A, *local] of A stacks -> whole parameters of this rank's share [N / n, A, *whole]."""
        ranks, own = len(shares), shares[self._group.rank()]
        received = local.new_empty(ranks * own, *local.shape[1:])
        dist.all_to_all_single(received, local.contiguous(), [own] * ranks, list(shares), group=self._group)
        return torch.cat(received.view(ranks, own, *local.shape[1:]).unbind(0), self.view.axis + 2)

    def _to_slices(self, whole: Tensor, shares: Sequence[int]) -> Tensor:
        """The inverse, for any number of stacks."""
        ranks, own = len(shares), shares[self._group.rank()]
        sent = torch.cat(whole.chunk(ranks, self.view.axis + 2))
        received = whole.new_empty(sum(shares), *sent.shape[1:])
        dist.all_to_all_single(received, sent, list(shares), [own] * ranks, group=self._group)
        return received

    def _gather(self, new: Tensor, shares: Sequence[int], *, like: Tensor) -> Tensor:
        """New values of every rank's matrices, on all ranks; shares differ by one, and the smaller ones are filled up."""
        most, each = max(shares), len(like) // sum(shares)
        filled = new.new_zeros(most * each, *new.shape[1:])
        used = shares[self._group.rank()] * each
        filled[:used] = new[:used]
        received = new.new_empty(len(shares) * most * each, *new.shape[1:])
        dist.all_gather_into_tensor(received, filled, group=self._group)
        return torch.cat([part[: share * each] for part, share in zip(received.chunk(len(shares)), shares, strict=True)])
