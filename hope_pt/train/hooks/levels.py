"""Writes what the optimizer measured of its last step: a line of `optim/...` values where there is one."""

from collections.abc import Callable, Sequence

from hope_pt.report.metrics import Sink, finite
from hope_pt.train.hooks.base import Hook, StepRecord


class LevelsHook(Hook):
    """`measured` gives the values of the last step, {} where nothing was due; the first rank has the sinks."""

    def __init__(self, measured: Callable[[], dict[str, float]], *, sinks: Sequence[Sink]):
        self._measured, self._sinks = measured, sinks

    def after_step(self, record: StepRecord) -> None:
        """The line of this step, if it has one."""
        values = self._measured()
        for sink in self._sinks if values else ():
            sink.write(step=record.step, values={key: finite(value) for key, value in values.items()})
