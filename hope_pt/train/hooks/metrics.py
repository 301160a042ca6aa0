"""Writes one line a step to every sink: metrics.jsonl first, trackers after it."""

import time
from collections.abc import Sequence

from hope_pt.report.metrics import Sink, Value, finite
from hope_pt.train.hooks.base import Hook, StepRecord


class MetricsHook(Hook):
    """`sinks` is empty on every rank but the first."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks

    def after_step(self, record: StepRecord) -> None:
        """The training line of this step."""
        values: dict[str, Value] = {
            "loss": finite(record.loss),
            "lr": record.lr,
            "grad_norm": finite(record.grad_norm),
            "skipped": record.skipped,
            "skips": record.skips,
            "tokens": record.tokens,
            "tokens_per_s": record.tokens_per_s,
            "data_s": record.data_s,
            "wall_s": record.wall_s,
            "time": time.time(),
        }
        for sink in self._sinks:
            sink.write(step=record.step, values=values)

    def close(self) -> None:
        """Closes the sinks."""
        for sink in self._sinks:
            sink.close()
