"""Calls a measuring function at intervals and writes its values to the sinks: evaluations and memory diagnostics."""

import logging
import time
from collections.abc import Callable, Sequence

from hope_pt.report.metrics import Sink, finite
from hope_pt.train.hooks.base import Hook, StepRecord, due
from hope_pt.train.wishes import Wishes

LOG = logging.getLogger(__name__)


class MeasureHook(Hook):
    """`measure` -> metrics, every `every` steps, before the first step if `at_start`, and after step `last_step`.

    Every rank calls `measure` (it may gather weights); the first one has the sinks. `announce` logs the values for the reader of the
    console. A run that is asked to stop has no time for what was due at that step: the session that continues from there, which is
    `owed` it, measures first.
    """

    phase = "evaluation"

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        *,
        sinks: Sequence[Sink],
        every: int,
        at_start: bool = False,
        last_step: int | None = None,
        announce: bool = False,
        wishes: Wishes | None = None,
        owed: bool = False,
    ):
        self._measure, self._sinks, self._every = measure, sinks, every
        self._at_start, self._last_step, self._announce = at_start, last_step, announce
        self._wishes, self._owed = wishes, owed

    def start(self, step: int) -> None:
        """Measures an untrained model, if asked, or what the last session had no time for."""
        owed = self._owed and due(step, every=self._every)
        if not self._is_stopping() and (owed or (self._at_start and step == 0)):
            self._run(step)

    def after_step(self, record: StepRecord) -> None:
        """Measures where it is due."""
        if record.step == self._last_step or (due(record.step, every=self._every) and not self._is_stopping()):
            self._run(record.step)

    def _is_stopping(self) -> bool:
        return self._wishes is not None and bool(self._wishes.reason)

    def _run(self, step: int) -> None:
        began = time.perf_counter()
        values = self._measure()
        line = {key: finite(value) for key, value in values.items()}
        bad = [key for key, value in line.items() if value is None]
        if bad:
            LOG.warning("step %d: not finite: %s", step, ", ".join(bad))
        for sink in self._sinks:
            sink.write(step=step, values=line)
        if self._announce and self._sinks:
            headlines = {key.removeprefix("eval/"): value for key, value in line.items() if key.count("/") == 1 and value is not None}
            shown = "  ".join(f"{key} {value:.4g}" for key, value in headlines.items())
            LOG.info("step %d: %s (%.1f s)", step, shown, time.perf_counter() - began)
