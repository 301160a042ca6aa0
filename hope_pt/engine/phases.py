"""What the main thread of a rank is doing, for whoever watches it from another thread, and how long it may take.

The training loop says it, from the `phase` of every hook, and the session says when it closes (`Watch.phases.enter`); `engine.hangs`
compares it with the limits of the section [watchdog].
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
        self.waited: tuple[int, float] = (0, 0.0)
        """Number of a phase, and its seconds that do not count: spent waiting for a rank with a task of its own. The watching thread's."""
        self._first_step: tuple[float, ...] = ()
        self._steps: tuple[float, ...] = ()  # replaced, never changed: another thread may be reading it

    def enter(self, name: str, *, step: int) -> None:
        """A new phase begins; the one before has ended."""
        ended, now, (serial, waited) = self.now, time.monotonic(), self.waited
        seconds = now - ended.began - (waited if serial == ended.serial else 0.0)
        if ended.name == "step":
            self._steps = (*self._steps[1 - _WINDOW :], seconds)
        elif ended.name == "first_step":
            self._first_step = (seconds,)
        self.now = Phase(name, step, now, ended.serial + 1)

    @property
    def step_s(self) -> float:
        """The median of the last 32 steps in seconds, without what they `waited`; until there is one, the first step; 0 before that."""
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


def limits_beyond(timeout_s: int, *, limits: WatchdogConfig) -> list[str]:
    """The limits, as "name = seconds", that do not act where ranks wait for each other: a collective fails after `timeout_s` seconds."""
    seconds = {key: value for key, value in limits.model_dump().items() if key.endswith("_s")}
    return [f"{key} = {value}" for key, value in seconds.items() if value == 0 or value >= timeout_s]
