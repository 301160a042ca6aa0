"""What somebody outside wants of a training: that it stops, or that it saves. All ranks agree on the step at which they do.

    signal in any rank, or STOP or SAVE in the run directory  ->  a flag  ->  largest over all ranks after every step  ->  save, end

A handler only sets the flag: a save is a collective, and the ranks receive the same signal at different steps. A rank that another's
failure has thrown out of its collective ends as failed even where it was signalled, because it never comes to the agreement; srun
signals the healthy ranks of a job of which one has failed.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hope_pt.engine import collectives
from hope_pt.signals import STOP_SIGNALS
from hope_pt.train.hooks.base import Hook, StepRecord

LOG = logging.getLogger(__name__)

STOP, SAVE = "STOP", "SAVE"
_REASONS = ("", "usr1", "usr2", "stop", "term")
"""Ascending: of several wishes the last counts. The first two come before a time limit, the others are somebody's decision."""


class Wishes(Hook):
    """What all ranks have agreed on after the last step.

    reason: why the run ends there, empty if it does not ("usr1", "usr2", "term": signals, "stop": the file). save: whether somebody wants
    a checkpoint of that step.
    """

    def __init__(self, directory: Path):
        self.reason, self.save = "", False
        self._directory, self._signalled = directory, 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signals of `STOP_SIGNALS` are wishes. In another thread than the main one Python has no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, step: int) -> None:
        """Who is asked to stop before the first step takes none; there is nothing to save yet."""
        self._agree(step, can_save=False)

    def after_step(self, record: StepRecord) -> None:
        """Asks all ranks."""
        self._agree(record.step, can_save=True)

    def fulfilled(self) -> None:
        """The run has saved and ends: the next session of it is not asked again. The first rank only."""
        (self._directory / STOP).unlink(missing_ok=True)

    def _receive(self, number: int, frame: Any) -> None:
        self._signalled = max(self._signalled, _REASONS.index(STOP_SIGNALS[signal.Signals(number)]))

    def _agree(self, step: int, *, can_save: bool) -> None:
        mine, save = self._signalled, False
        if collectives.rank() == 0:
            mine = max(mine, _REASONS.index("stop") if (self._directory / STOP).exists() else 0)
            save = can_save and (self._directory / SAVE).exists()
        agreed, saves = collectives.largest([mine, int(save)])
        self.reason, self.save = _REASONS[agreed], bool(saves)
        if collectives.rank() == 0 and self.reason:
            LOG.info("asked to stop (%s): all ranks end after step %d", self.reason, step)
        if collectives.rank() == 0 and self.save:
            LOG.info("asked to save: step %d", step)
            (self._directory / SAVE).unlink(missing_ok=True)
