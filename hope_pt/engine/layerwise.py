"""Layer-wise sharding of the outer optimizer: every data-parallel rank owns whole parameters.

`engine.distributed_optimizer` cuts AdamW's state anywhere, also within a row. A rule that takes matrices apart (Newton-Schulz) needs
them whole, so with one of those the ranks of the data and context axes divide the *parameters*: gradients are all-reduced, the owner of a
parameter alone keeps its fp32 master and its state and updates it, and `Exchange` gives the new value to the others.

`owners` is arithmetic on the whole (unsharded) shapes: all tensor-parallel ranks, and the planner, have the same answer.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_pt.optim.groups import Group

BUCKET_BYTES = 64 * 2**20
"""Most bytes of one broadcast: enough for the full rate of a link, little beside a model."""
IN_FLIGHT = 4
"""Broadcasts whose buffers exist at the same time."""


def owners(costs: Mapping[str, float], *, periods: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which of `ranks` ranks owns each name: the costliest first, each to the rank with the least so far.

    Names with the same period are updated in the same steps and are divided evenly among themselves, so that no step waits for one rank;
    no rank has more than 4/3 of the least possible maximum of them (Graham 1969). Ties go by what the ranks have in all, by name and by
    rank: every caller gets the same.
    """
    found: dict[str, int] = {}
    loads = [0.0] * ranks
    for period in sorted(set(periods.values())):
        heap = [(0.0, load, rank) for rank, load in enumerate(loads)]
        heapq.heapify(heap)
        for name in sorted((name for name in costs if periods[name] == period), key=lambda name: (-costs[name], name)):
            here, _, rank = heapq.heappop(heap)
            found[name] = rank
            loads[rank] += costs[name]
            heapq.heappush(heap, (here + costs[name], loads[rank], rank))
    return found


def groups_of(groups: Sequence[Group], *, owner_of: Mapping[str, int], rank: int) -> list[Group]:
    """What of the groups `rank` owns, without those of which it owns nothing."""
    own = [replace(group, names=tuple(name for name in group.names if owner_of[name] == rank)) for group in groups]
    return [group for group in own if group.names]


@dataclass(frozen=True)
class Bucket:
    """Parameters of one owner, clock and dtype that travel together."""

    owner: int
    period: int
    names: tuple[str, ...]


def buckets(parameters: Mapping[str, Tensor], *, owner_of: Mapping[str, int], periods: Mapping[str, int]) -> list[Bucket]:
    """All parameters in buckets of at most BUCKET_BYTES (a larger parameter is alone), in an order that all ranks share."""
    lists: dict[tuple[int, int, torch.dtype], list[str]] = {}
    for name, parameter in parameters.items():
        lists.setdefault((owner_of[name], periods[name], parameter.dtype), []).append(name)
    return [
        Bucket(owner, period, names)
        for (owner, period, _), members in lists.items()
        for names in _split(members, sizes={name: parameters[name].nbytes for name in members})
    ]


def _split(names: Sequence[str], *, sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    bucket: list[str] = []
    for name in names:
        if bucket and sum(sizes[other] for other in bucket) + sizes[name] > BUCKET_BYTES:
            yield tuple(bucket)
            bucket = []
        bucket.append(name)
    yield tuple(bucket)


class Exchange:
    """Gives updated values from their owners to all ranks of `group`, in the parameters' own dtypes."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, owner_of: Mapping[str, int], periods: Mapping[str, int], group: dist.ProcessGroup
    ):
        self._parameters, self._group = parameters, group
        self._buckets = buckets(parameters, owner_of=owner_of, periods=periods)

    @torch.no_grad()
    def run(self, *, num_calls: int) -> None:
        """After call `num_calls` of the clock: broadcasts the parameters whose interval has just ended. A collective of the group."""
        due: Iterable[Bucket] = [bucket for bucket in self._buckets if num_calls % bucket.period == 0]
        if self._group.size() == 1:
            return
        open_: deque[tuple[Bucket, Tensor, dist.Work]] = deque()
        for bucket in due:
            if len(open_) == IN_FLIGHT:
                self._finish(*open_.popleft())
            open_.append(self._start(bucket))
        while open_:
            self._finish(*open_.popleft())

    def _start(self, bucket: Bucket) -> tuple[Bucket, Tensor, dist.Work]:
        values = [self._parameters[name].data for name in bucket.names]
        if self._group.rank() == bucket.owner:
            flat = torch.cat([value.reshape(-1) for value in values])
        else:
            flat = values[0].new_empty(sum(value.numel() for value in values))
        return bucket, flat, dist.broadcast(flat, group=self._group, group_src=bucket.owner, async_op=True)

    def _finish(self, bucket: Bucket, flat: Tensor, work: dist.Work) -> None:
        work.wait()
        if self._group.rank() == bucket.owner:
            return
        values = [self._parameters[name].data for name in bucket.names]
        parts = flat.split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view(value.shape) for part, value in zip(parts, values, strict=True)])
