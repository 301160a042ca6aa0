"""`run_distributed`: a function on several gloo processes, for tests.

Workers are forked, so they start in a fraction of a second with everything the parent has imported, and `func` may be any callable. The
rules that make such tests trustworthy are here: a hard time limit, the traceback of the rank that failed first, and no process left
behind, whatever happens to the parent. Linux, CPU only: a process that has used a GPU must not fork.
"""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from hope_pt.engine import Launch
from hope_pt.errors import ParallelError

_PR_SET_PDEATHSIG = 1


def run_distributed(func: Callable[..., Any], *, world_size: int, timeout_s: float, args: tuple = ()) -> list[Any]:
    """Call `func(launch, *args)` on `world_size` forked processes and return the results by rank.

    `launch` is a `hope_pt.engine.Launch` with an address of its own for this call. Results must be picklable (tensors are copied).
    ParallelError names the first rank that failed, with its traceback, or the ranks that were still running after `timeout_s` seconds,
    with their stacks; all workers have been killed and waited for when it is raised.
    """
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []
    # Garbage of the parent must not be collected in a child: destructors of its process groups wait for threads that only it has.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="hope-distributed-") as name:
        folder = Path(name)
        try:
            for rank in range(world_size):
                launch = Launch(rank=rank, world_size=world_size, local_rank=rank, master_addr=f"file://{folder / 'store'}")
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(func, launch, args, writer, folder))
                process.start()
                writer.close()
                workers.append(_Worker(process, reader))
            return _collect(workers, timeout_s=timeout_s, folder=folder)
        finally:
            gc.unfreeze()
            for worker in workers:
                worker.process.kill()
                worker.process.join()
                worker.reader.close()


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    reader: Connection


def _work(func: Callable[..., Any], launch: Launch, args: tuple, writer: Connection, folder: Path) -> None:
    # The kernel kills this process when the parent dies, however it dies.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stacks = _stack_file(folder, launch.rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks)
    # The parent's thread pool does not survive the fork.
    torch.set_num_threads(1)
    try:
        message = (True, func(launch, *args))
    except BaseException:
        message = (False, traceback.format_exc())
    # Not writer.send: torch would pass tensors as shared memory of a process that is about to end.
    writer.send_bytes(pickle.dumps(message))
    os._exit(0)


def _collect(workers: Sequence[_Worker], *, timeout_s: float, folder: Path) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(workers):
        pending = [worker.reader for rank, worker in enumerate(workers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(workers)) if rank not in results]
            where = _stacks(workers, late=late, folder=folder)
            raise ParallelError(f"ranks {late} of {len(workers)} were still running after {timeout_s} s; killed\n{where}")
        for rank in (rank for rank, worker in enumerate(workers) if worker.reader in ready):
            try:
                # Written by _work of this call, in a pipe that nobody else holds.
                succeeded, value = pickle.loads(workers[rank].reader.recv_bytes())  # noqa: S301
            except EOFError:
                raise ParallelError(f"rank {rank} of {len(workers)} died without a result (killed, or crashed in native code)") from None
            if not succeeded:
                raise ParallelError(f"rank {rank} of {len(workers)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(workers))]


def _stacks(workers: Sequence[_Worker], *, late: Sequence[int], folder: Path) -> str:
    """The Python stacks of the late ranks, as far as they can still write them."""
    ready = [rank for rank in late if _stack_file(folder, rank).exists()]
    for rank in ready:
        os.kill(workers[rank].process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"rank {rank}:\n{_stack_file(folder, rank).read_text()}" for rank in ready)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"
