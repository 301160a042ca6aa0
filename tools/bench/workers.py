"""Processes that compile and check kernels side by side for the GPU benchmark."""

import importlib
import multiprocessing
import time
from typing import Any

SECONDS = 420
"""For all tasks of one call: a kernel that hangs must not hold the machine."""
TASKS_OF_A_PROCESS = 8
"""One illegal access spoils all that follows in its process."""


def prepare(*, rehearse: bool) -> None:
    """What every process does before its first kernel."""
    if rehearse:
        from hope_pt.testing.interpreter import correct_bfloat16

        correct_bfloat16()


class Workers:
    """Runs tasks in `jobs` processes, or with 0 in this one."""

    def __init__(self, jobs: int, *, rehearse: bool):
        self.jobs, self.rehearse = jobs, rehearse

    def run(self, task: str, arguments: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        """(result, "") or (None, what went wrong) of `task`, "module:function", for every a in `arguments`, in their order.

        The task is a name and its arguments are plain values, so that a module that cannot be imported is an answer too.
        """
        if not self.jobs:
            return [attempt(task, self.rehearse, *a) for a in arguments]
        end = time.monotonic() + SECONDS
        with multiprocessing.get_context("spawn").Pool(self.jobs, maxtasksperchild=TASKS_OF_A_PROCESS) as pool:
            asked = [pool.apply_async(attempt, (task, self.rehearse, *a)) for a in arguments]
            return [_answer(each, end) for each in asked]


def _answer(asked: Any, end: float) -> tuple[Any, str]:
    try:
        return asked.get(max(0.0, end - time.monotonic()))
    except multiprocessing.TimeoutError:
        return None, f"no answer within {SECONDS} s: it hangs, or its process died"


def attempt(task: str, rehearse: bool, *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, the error's first line)."""
    try:
        prepare(rehearse=rehearse)
        module, _, function = task.partition(":")
        return getattr(importlib.import_module(module), function)(*arguments), ""
    except Exception as error:  # every task reports; the program ends with an error
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
