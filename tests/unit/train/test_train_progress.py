"""What the console shows: a bar on a terminal, plain lines without control characters elsewhere."""

import io

from rich.console import Console

from hope_pt.train.hooks.base import StepRecord
from hope_pt.train.hooks.progress import ProgressHook


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=2.5, lr=1e-3, grad_norm=0.25, skipped=False, tokens=10, tokens_per_s=1234.5, data_s=0.0, wall_s=1.0
    )  # fmt: skip


def show(*, terminal: bool, seconds: float) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    hook = ProgressHook(num_steps=50, console=console, seconds_between_lines=seconds)
    hook.start(10)
    for step in range(11, 51):
        hook.after_step(record(step))
    hook.close()
    hook.close()
    return console.file.getvalue()


def test_without_a_terminal_the_first_and_last_step_are_plain_lines():
    lines = show(terminal=False, seconds=1000.0).splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["step 11/50", "step 50/50"]
    assert "loss 2.5000  lr 1.00e-03  grad 0.25  1,234 tok/s  eta 0:00:00" in lines[-1]
    assert "\r" not in "".join(lines) and "\x1b" not in "".join(lines)


def test_lines_come_as_often_as_asked():
    assert len(show(terminal=False, seconds=0.0).splitlines()) == 40


def test_a_terminal_gets_a_bar():
    text = show(terminal=True, seconds=0.0)
    assert "50/50" in text and "loss 2.5000" in text and "step 50/50" not in text
