"""What the person at the console sees: a bar with the time left on a terminal, a plain line every few seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hope_pt.train.hooks.base import Hook, StepRecord


class ProgressHook(Hook):
    """Shows step, loss, learning rate, speed and time left on `console` (standard error by default), of `num_steps` steps."""

    def __init__(self, *, num_steps: int, console: Console | None = None, seconds_between_lines: float = 10.0):
        self._num_steps = num_steps
        self._console = console or Console(stderr=True)
        self._between = seconds_between_lines
        self._bar: Progress | None = None
        self._first_step, self._began, self._next_line = 0, 0.0, 0.0

    def start(self, step: int) -> None:
        """Opens the bar."""
        self._first_step, self._began = step, time.monotonic()
        if self._console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=60.0)
            self._task = self._bar.add_task("starting", total=self._num_steps, completed=step)
            self._bar.start()

    def after_step(self, record: StepRecord) -> None:
        """Moves the bar, or prints a line: the first, the last, and one every few seconds."""
        text = f"loss {record.loss:.4f}  lr {record.lr:.2e}  grad {record.grad_norm:.3g}  {record.tokens_per_s:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=text)
            return
        now = time.monotonic()
        if now >= self._next_line or record.step == self._num_steps:
            self._next_line = now + self._between
            left = (now - self._began) / (record.step - self._first_step) * (self._num_steps - record.step)
            line = f"step {record.step}/{self._num_steps}  {text}  eta {_duration(left)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
