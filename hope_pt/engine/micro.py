"""From the rows of a batch to what one rank computes at a time: micro-batches of rows, segments of a sequence, shards of a segment.

    rows [B, T] -> micro-batches of micro_batch_size rows -> train.segments pieces in order -> this context-parallel rank's shard

A document that began before the first token of a piece goes on in it: its layout knows how many tokens have been seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hope_pt.config.schema import RunConfig
from hope_pt.engine.model import Passage
from hope_pt.engine.plan import Plan
from hope_pt.nn import model_layout
from hope_pt.nn.layout import Layout, tokens_seen


class BatchLike(Protocol):
    """What the engine reads of a batch. tokens, targets int64; loss_mask float32, 1 = counted, 0 = not; doc_start bool: all [B, T]."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def loss_mask_BT(self) -> Tensor: ...
    @property
    def doc_start_BT(self) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """This rank's tokens of one forward pass, on its device: [micro_batch_size, mesh.tokens_per_rank] each."""

    tokens_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    passage: Passage


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch."""

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    doc_start_BT: Tensor


def own_rows(batch: BatchLike, *, plan: Plan) -> BatchLike:
    """This data-parallel rank's run of a batch's rows, as many on every rank: the last row fills up."""
    if plan.dp_size == 1:
        return batch
    fields = [torch.as_tensor(field) for field in (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, batch.doc_start_BT)]
    count = -(-len(fields[0]) // plan.dp_size)
    rows = torch.arange(plan.dp_rank * count, (plan.dp_rank + 1) * count).clamp(max=len(fields[0]) - 1)
    return _Rows(*(field[rows] for field in fields))


def micro_batches(batch: BatchLike, *, config: RunConfig, plan: Plan, whole: bool = False) -> list[MicroBatch]:
    """The micro-batches of a batch's rows, in the order in which they are computed.

    whole: fill up the rows to what a pipelined schedule takes, by repeating the last one.
    """
    starts = torch.as_tensor(batch.doc_start_BT)
    starts = starts if config.data.document_reset else torch.zeros_like(starts)
    fields = [torch.as_tensor(field) for field in (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, starts)]
    size = config.engine.micro_batch_size
    if whole:
        full = size * (plan.mesh.pipeline if plan.mesh.virtual > 1 else 1)
        missing = -len(starts) % full
        fields = [torch.cat([field, field[-1:].expand(missing, -1)]) for field in fields]
    fields = [field.to(plan.device, non_blocking=True) for field in fields]
    return [
        _micro_batch([field[first : first + size] for field in fields], segment, config=config, plan=plan)
        for first in range(0, len(fields[0]), size)
        for segment in range(config.train.segments)
    ]


def _micro_batch(fields: Sequence[Tensor], segment: int, *, config: RunConfig, plan: Plan) -> MicroBatch:
    tokens_BT, targets_BT, mask_BT, starts_BT = fields
    mesh, segments = plan.mesh, config.train.segments
    first = segment * mesh.tokens_per_rank * mesh.context
    here = slice(first + plan.groups.context.rank() * mesh.tokens_per_rank, first + (plan.groups.context.rank() + 1) * mesh.tokens_per_rank)
    by_state = config.engine.context_mode == "state" and mesh.context > 1
    # What the core of a mixer sees: the whole segment, or this rank's shard of it.
    seen_by_core = here if by_state else slice(first, first + mesh.tokens_per_rank * mesh.context)
    layout = _layout(starts_BT, seen_by_core, carried=by_state or segments > 1, config=config)
    passage = Passage(layout, continues=segment > 0, keeps=segment + 1 < segments)
    return MicroBatch(tokens_BT[:, here].contiguous(), targets_BT[:, here].contiguous(), mask_BT[:, here].contiguous(), passage)


def _layout(starts_BT: Tensor, window: slice, *, carried: bool, config: RunConfig) -> Layout | None:
    shape = (len(starts_BT), window.stop - window.start)
    seen_B = tokens_seen(starts_BT, window.start) if carried else None
    return model_layout(config.model, shape, doc_start_BT=starts_BT[:, window], seen_B=seen_B, device=starts_BT.device)


def join_losses(reports: Sequence[Tensor], *, rows: int, config: RunConfig, plan: Plan) -> Tensor:
    """The losses [rows, T] of a whole batch from those of all ranks' micro-batches of `own_rows` [b, T'], in order; on every rank."""
    mesh, groups, segments = plan.mesh, plan.groups, config.train.segments
    count = mesh.tokens_per_rank
    own = -(-rows // mesh.data)
    # Ranks fill different places of one tensor of zeros.
    total = torch.zeros(own * mesh.data, config.data.seq_len, device=plan.device)
    mine = total[plan.dp_rank * own : (plan.dp_rank + 1) * own]
    for index, report_BT in enumerate(reports):
        row, segment = index // segments * config.engine.micro_batch_size, index % segments
        first = (segment * mesh.context + groups.context.rank()) * count
        place = mine[row : row + len(report_BT), first : first + count]
        place.copy_(report_BT[: len(place)])
    for group in (groups.context, groups.data, groups.pipeline):
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return total[:rows]
