"""Keeps status.json current, for whoever watches the run from outside."""

import time
from collections.abc import Callable

from hope_pt.train.directory import RunDirectory
from hope_pt.train.hooks.base import Hook, StepRecord


class StatusHook(Hook):
    """Rewrites the status at most every `seconds` seconds; the first rank only. committed: step of the newest checkpoint."""

    def __init__(self, directory: RunDirectory, *, num_steps: int, committed: Callable[[], int], seconds: float = 10.0):
        self._directory, self._num_steps, self._committed, self._seconds = directory, num_steps, committed, seconds
        self._next = 0.0

    def start(self, step: int) -> None:
        """Says that the run is under way."""
        self._write(step)

    def after_step(self, record: StepRecord) -> None:
        """Says how far it is."""
        if time.monotonic() >= self._next:
            self._write(record.step)

    def _write(self, step: int) -> None:
        self._directory.write_status(state="running", step=step, num_steps=self._num_steps, checkpoint=self._committed())
        self._next = time.monotonic() + self._seconds
