"""What all ranks of a job tell each other besides tensors. A process that belongs to no job is its own only rank.

Every function here but `rank`, `size` and `is_broken` is collective: all ranks call it in the same order.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hope_pt.errors import HopeError


def rank() -> int:
    """Of this process in the whole job."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank, on every rank; any picklable value."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The value of the first rank, on every rank; any picklable value."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_true(flag: bool) -> bool:
    """Whether `flag` is true on every rank; as cheap as `largest`."""
    return not largest([int(not flag)])[0]


def largest(values: Sequence[int]) -> list[int]:
    """The largest of every value over all ranks; one small reduction, cheap enough for every step."""
    if size() == 1:
        return list(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def is_broken(error: BaseException | None) -> bool:
    """Whether `error`, or one that it came from, is a collective that failed: the symptom of another rank's end, or of the network's."""
    while error is not None:
        # gloo raises plain RuntimeError.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error of the user's or of the disk on any rank within it is raised on every rank: that of the lowest rank which has one.

    Nothing within it may be collective. Any other exception is a bug; it ends its process, and the launcher the job.
    """
    error: Exception | None = None
    try:
        yield
    except (HopeError, OSError) as caught:
        error = caught
    for first in gather(error):
        if first is not None:
            raise first


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it there are process groups: those of the job, or for its duration one of this process alone."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
