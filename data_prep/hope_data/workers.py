"""Run independent jobs in order, in this process or in several, with a line of progress now and then."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hope_data.errors import PrepError

_PROGRESS_SECONDS = 2.0
_PARENT_CHECK_SECONDS = 1.0


def run_jobs(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, workers: int, label: str) -> list[Any]:
    """`[job(*a) for a in arguments]`; the order of results is that of the arguments for any number of workers."""
    results: list[Any] = []
    shown = time.monotonic()
    for result in _results(job, arguments, workers=min(workers, len(arguments))):
        results.append(result)
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"{label} {len(results)}/{len(arguments)}", file=sys.stderr, flush=True)
    return results


def _results(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, workers: int) -> Any:
    if workers <= 1:
        yield from (job(*a) for a in arguments)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent, initargs=(os.getpid(),))
    try:
        futures = [pool.submit(job, *a) for a in arguments]
        yield from (f.result() for f in futures)
    except BrokenProcessPool:
        raise PrepError("a worker process was killed (out of memory?); finished parts are kept: run again with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
