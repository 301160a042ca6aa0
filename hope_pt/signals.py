"""The signals that ask a training run to stop, and how to keep them from the processes that it starts."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

STOP_SIGNALS = {signal.SIGUSR1: "usr1", signal.SIGUSR2: "usr2", signal.SIGTERM: "term"}
"""A scheduler sends them before the time limit, and when it cancels or moves a job; srun sends them to every process of the job."""


@contextlib.contextmanager
def noted() -> Iterator[set[str]]:
    """Within it the signals end nothing: their names are in the set. In another thread than the main one Python has no signals."""
    names: set[str] = set()
    if threading.current_thread() is not threading.main_thread():
        yield names
        return
    before = {number: signal.signal(number, lambda number, _: names.add(STOP_SIGNALS[signal.Signals(number)])) for number in STOP_SIGNALS}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started within it, and those that these start, never see the signals; this process gets them when it is over.

    SIGKILL still ends such a process, and reader processes end by themselves when their trainer is gone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # Python starts this process beside the first other one, and unblocks SIGTERM after it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
