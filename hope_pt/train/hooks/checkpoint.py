"""Saves the run's state at intervals, at the end, and when asked; metrics up to the step are on the disk before its checkpoint is."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hope_pt import checkpoint
from hope_pt.config.schema import CheckpointConfig
from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard
from hope_pt.errors import DivergenceError
from hope_pt.report.metrics import Sink
from hope_pt.train.hooks.base import Hook, StepRecord, due
from hope_pt.train.wishes import Wishes

LOG = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """`capture(record)` -> (this rank's shards, meta). On every rank, because saving is collective; the first one has the sinks.

    Asynchronous: at most one checkpoint is on its way. It is committed after the first step at which all ranks have written theirs, before
    the next one begins, and after the last step. committed: step of the newest one that is; at first of the one that was continued from.
    """

    phase = "checkpoint"

    def __init__(
        self,
        capture: Callable[[StepRecord], tuple[list[Shard], dict]],
        *,
        root: Path,
        layout: str,
        config: CheckpointConfig,
        last_step: int,
        wishes: Wishes,
        committed: int,
        sinks: Sequence[Sink],
    ):
        self.committed = committed
        self._capture, self._root, self._layout = capture, root, layout
        self._config, self._last_step, self._wishes, self._sinks = config, last_step, wishes, sinks
        self._saving: tuple[int, checkpoint.Saving] | None = None

    def after_step(self, record: StepRecord) -> None:
        """Saves where it is due or wished for, and after the last step."""
        last = record.step == self._last_step or bool(self._wishes.reason)
        begins = last or self._wishes.save or due(record.step, every=self._config.every)
        self._advance(wait=begins)
        if begins:
            self._begin(record)
            self._advance(wait=last or not self._config.asynchronous)

    def close(self) -> None:
        """A session that ends before its last step loses the checkpoint that was on its way; the ranks may not be together any more."""
        if self._saving is not None:
            self._saving[1].abandon()

    def _begin(self, record: StepRecord) -> None:
        shards, meta = self._capture(record)
        _check_finite(shards, step=record.step)
        for sink in self._sinks:
            sink.sync()
        retention = {"keep": self._config.keep, "keep_every": self._config.keep_every}
        saving = checkpoint.Saving(self._root, step=record.step, shards=shards, meta=meta, layout=self._layout, **retention)
        self._saving = (record.step, saving)

    def _advance(self, *, wait: bool) -> None:
        if self._saving is not None and self._saving[1].advance(wait=wait):
            self.committed, self._saving = self._saving[0], None


def _check_finite(shards: Sequence[Shard], *, step: int) -> None:
    """Collective. The loss of a step is that of the weights before it; the weights after it are looked at here."""
    with collectives.together():
        for shard in shards:
            if shard.data.is_floating_point() and not torch.isfinite(shard.data).all():
                raise DivergenceError(
                    f"step {step}: {shard.name} has values that are not finite; the state was not saved and the same command would meet "
                    "this step again: lower optim.lr or optim.clip"
                )
