"""Which rank the others wait for: every so many steps the ranks compare what a step costs each of them before it waits.

    own time of a step = wait for its batch + forward and backward passes up to the first data-parallel reduction (engine.stopwatch)

Each rank takes the median over its steps since the last comparison; all ranks gather these; the first one writes and warns by name.
"""

import logging
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hope_pt.engine import collectives
from hope_pt.report.metrics import Sink
from hope_pt.train.hooks.base import Hook, StepRecord, due

LOG = logging.getLogger(__name__)

SLOW = 1.3
"""A rank is called slow from this many times the median own time of all ranks."""
_NAMED = 4
"""Slow ranks that one line names."""


@dataclass(frozen=True)
class Times:
    """Of one rank: medians of its own time and of the part of it spent waiting for data, in seconds a step."""

    own_s: float
    data_s: float
    host: str


def slow_ranks(times: Sequence[Times]) -> list[int]:
    """Ranks above `SLOW` times the median, the slowest first. Of an even number the median is the lower middle one: of two, one can be."""
    middle = statistics.median_low(one.own_s for one in times)
    return sorted((rank for rank, one in enumerate(times) if one.own_s > SLOW * middle), key=lambda rank: -times[rank].own_s)


class StragglersHook(Hook):
    """Compares the ranks every `every` steps. own_s: seconds of the last step's passes on this rank. The first rank has the sinks."""

    def __init__(self, own_s: Callable[[], float], *, sinks: Sequence[Sink], every: int):
        self._own_s, self._sinks, self._every = own_s, sinks, every
        self._host = socket.gethostname()
        self._own: list[float] = []
        self._data: list[float] = []

    def after_step(self, record: StepRecord) -> None:
        """Takes note of the step; a collective of the job where a comparison is due."""
        self._own.append(self._own_s() + record.data_s)
        self._data.append(record.data_s)
        if due(record.step, every=self._every):
            times = collectives.gather(Times(statistics.median(self._own), statistics.median(self._data), self._host))
            self._own, self._data = [], []
            if self._sinks:
                self._report(record.step, times)

    def _report(self, step: int, times: Sequence[Times]) -> None:
        middle = statistics.median_low(one.own_s for one in times)
        slowest = max(range(len(times)), key=lambda rank: times[rank].own_s)
        for sink in self._sinks:
            sink.write(
                step=step,
                values={
                    "stragglers/slowest_rank": slowest,
                    "stragglers/own_s_median": middle,
                    "stragglers/own_s_max": times[slowest].own_s,
                    "stragglers/data_s_max": max(one.data_s for one in times),
                },
            )
        slow = slow_ranks(times)
        if not slow:
            LOG.info("step %d: no slow rank; the slowest is %s", step, _named(slowest, times, middle=middle))
            return
        named = "; ".join(_named(rank, times, middle=middle) for rank in slow[:_NAMED])
        more = f"; and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
        LOG.warning("step %d: the job waits for %s%s; the median of the ranks is %.3g s a step", step, named, more, middle)


def _named(rank: int, times: Sequence[Times], *, middle: float) -> str:
    own = times[rank]
    factor = own.own_s / middle if middle else 1.0
    return f"rank {rank} on {own.host} ({own.own_s:.3g} s, {factor:.2f} times the median, {own.data_s:.3g} s of it waiting for data)"
