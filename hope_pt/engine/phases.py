"""What the main thread of a rank is doing, for whoever watches it from another thread, and how long it may take.

The loop and the hooks say it (`Watch.phases.enter`); `engine.hangs` compares it with the limits of the section [watchdog].
"""

import statistics
import time
from dataclasses import dataclass

from hope_pt.config.schema import WatchdogConfig

_WINDOW = 32  # steps


@dataclass(frozen=True)
class Phase:
    """name: setup, first_step, step, checkpoint, evaluation or close; step: steps done before; began: of time.monotonic; serial: number."""

    name: str
    step: int
    began: float
    serial: int


class Phases:
    """Written by the main thread, read by any."""

    def __init__(self) -> None:
        self.now = Phase("setup", 0, time.monotonic(), 0)
        self._first_step: tuple[float, ...] = ()
        self._steps: tuple[float, ...] = ()  # replaced, never changed: another thread may be reading it

    def enter(self, name: str, *, step: int) -> None:
        """A new phase begins; the one before has ended."""
        ended, now = self.now, time.monotonic()
        if ended.name == "step":
            self._steps = (*self._steps[1 - _WINDOW :], now - ended.began)
        elif ended.name == "first_step":
            self._first_step = (now - ended.began,)
        self.now = Phase(name, step, now, ended.serial + 1)

    @property
    def step_s(self) -> float:
        """The median of the last 32 steps in seconds; until there is one, the first step, which is not shorter; 0 before that."""
        known = self._steps or self._first_step
        return statistics.median(known) if known else 0.0


def limit_s(name: str, *, limits: WatchdogConfig, step_s: float) -> float:
    """Seconds that the phase `name` may last, 0: for ever; `step_s` is what steps take. The end of a run has the limit of checkpoints."""
    if name == "step":
        return max(float(limits.step_s), limits.step_factor * step_s) if limits.step_s else 0.0
    return {
        "setup": limits.setup_s,
        "first_step": limits.first_step_s,
        "checkpoint": limits.checkpoint_s,
        "evaluation": limits.evaluation_s,
        "close": limits.checkpoint_s,
    }[name]
