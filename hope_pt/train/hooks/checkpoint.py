"""Saves the run's state at intervals and at the end; metrics up to the step are on the disk before its checkpoint is."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hope_pt import checkpoint
from hope_pt.config.schema import CheckpointConfig
from hope_pt.errors import DivergenceError
from hope_pt.report.metrics import Sink
from hope_pt.train.hooks.base import Hook, StepRecord, due

LOG = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """`capture(record)` -> (tensors, meta); every rank calls it (it may gather), the rank with `root` writes."""

    def __init__(
        self,
        capture: Callable[[StepRecord], tuple[dict[str, Tensor], dict]],
        *,
        root: Path | None,
        config: CheckpointConfig,
        last_step: int,
        sinks: Sequence[Sink],
    ):
        self._capture, self._root, self._config, self._last_step, self._sinks = capture, root, config, last_step, sinks

    def after_step(self, record: StepRecord) -> None:
        """Saves where it is due, and after the last step."""
        if due(record.step, every=self._config.every) or record.step == self._last_step:
            self._save(record)

    def _save(self, record: StepRecord) -> None:
        tensors, meta = self._capture(record)
        _check_finite(tensors, step=record.step)
        if self._root is None:
            return
        for sink in self._sinks:
            sink.sync()
        path = checkpoint.save(
            self._root, step=record.step, tensors=tensors, meta=meta, keep=self._config.keep, keep_every=self._config.keep_every
        )
        LOG.debug("saved %s", path)


def _check_finite(tensors: dict[str, Tensor], *, step: int) -> None:
    """The loss of a step is that of the weights before it; the weights after it are looked at here."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DivergenceError(
                f"step {step}: {name} has values that are not finite; the state was not saved and the same command would meet this "
                "step again: lower optim.lr or optim.clip"
            )
