"""What somebody outside wants of a training: that it stops, or that it saves. All ranks agree on the step at which they do.

    signal in any rank, or STOP or SAVE in the run directory  ->  a flag  ->  largest over all ranks after every step  ->  save, end

A handler only sets the flag: a save is a collective, and the ranks receive the same signal at different steps. A rank that another's
failure has thrown out of its collective ends as failed even where it was signalled, because it never comes to the agreement; srun
signals the healthy ranks of a job of which one has failed.
"""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from hope_pt.engine import collectives
from hope_pt.train.hooks.base import Hook, StepRecord

LOG = logging.getLogger(__name__)

STOP, SAVE = "STOP", "SAVE"
_REASONS = ("", "usr1", "usr2", "stop", "term")
"""Ascending: of several wishes the last counts. The first two come before a time limit, the others are somebody's decision."""


class Wishes(Hook):
    """What all ranks have agreed on after the last step. signals: names of those received so far, filled while the run goes on.

    reason: why the run ends there, empty if it does not ("usr1", "usr2", "term": signals, "stop": the file). save: whether somebody wants
    a checkpoint of that step.
    """

    def __init__(self, directory: Path, *, signals: Collection[str]):
        self.reason, self.save = "", False
        self._directory, self._signals = directory, signals
        self._begun = self._stop_seen = False

    def start(self, step: int) -> None:
        """Who is asked to stop before the first step takes none, and measures nothing; there is nothing to save yet."""
        self._agree(step, can_save=False)

    def before_step(self, step: int) -> bool:
        """Whether the run ends here. Asks all ranks once more before the first step: measurements at the start may have taken long."""
        if not self._begun:
            self._begun = True
            self._agree(step, can_save=False)
        return bool(self.reason)

    def after_step(self, record: StepRecord) -> None:
        """Asks all ranks."""
        self._forget_save()
        self._agree(record.step, can_save=True)

    def close(self) -> None:
        """Nothing is open; a save that was wished for is over."""
        self._forget_save()

    def fulfilled(self) -> None:
        """The run ends as it was asked to: the next session is not asked again. The first rank only."""
        if self._stop_seen:
            (self._directory / STOP).unlink(missing_ok=True)

    def _forget_save(self) -> None:
        if self.save and collectives.rank() == 0:
            (self._directory / SAVE).unlink(missing_ok=True)
        self.save = False

    def _agree(self, step: int, *, can_save: bool) -> None:
        mine, save = max((_REASONS.index(name) for name in self._signals), default=0), False
        if collectives.rank() == 0:
            # An error of the file system is no wish, and no reason to end.
            self._stop_seen = os.path.exists(self._directory / STOP)
            mine = max(mine, _REASONS.index("stop") if self._stop_seen else 0)
            save = can_save and os.path.exists(self._directory / SAVE)
        agreed, saves = collectives.largest([mine, int(save)])
        self.reason, self.save = _REASONS[agreed], bool(saves)
        if collectives.rank() == 0 and self.reason:
            LOG.info("asked to stop (%s): all ranks end after step %d", self.reason, step)
        if collectives.rank() == 0 and self.save:
            LOG.info("asked to save: step %d", step)
