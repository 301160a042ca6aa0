"""What the main thread of a rank is doing, for whoever watches it from another thread."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """name: setup, step, checkpoint, evaluation or close. step: steps done before. began: time.monotonic(). serial: counts all phases."""

    name: str
    step: int
    began: float
    serial: int


class Phases:
    """Written by the main thread, read by any."""

    def __init__(self) -> None:
        self.now = Phase("setup", 0, time.monotonic(), 0)

    def enter(self, name: str, *, step: int) -> None:
        """A new phase begins; the one before has ended."""
        self.now = Phase(name, step, time.monotonic(), self.now.serial + 1)
