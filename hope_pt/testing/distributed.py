"""`run_distributed`: a function on several gloo processes, for tests.

Workers are forked, so they start in a fraction of a second with everything the parent has imported, and `func` may be any callable. The
rules that make such tests trustworthy are here: a hard time limit, the traceback of the rank that failed first, and no process left
behind, whatever happens to the parent. Linux, CPU only: a process that has used a GPU must not fork.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hope_pt.engine import Launch
from hope_pt.errors import ParallelError

_PR_SET_PDEATHSIG = 1


def run_distributed(func: Callable[..., Any], *, world_size: int, timeout_s: float, args: tuple = ()) -> list[Any]:
    """Call `func(launch, *args)` on `world_size` forked processes and return the results by rank.

    `launch` is a `hope_pt.engine.Launch` with an address of its own for this call. Results must be picklable (tensors are copied).
    ParallelError names the first rank that failed, with its traceback, or the ranks that were still running after `timeout_s` seconds;
    all workers have been killed and waited for when it is raised.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="hope-distributed-") as folder:
        address = f"file://{Path(folder) / 'store'}"
        readers, workers = [], []
        try:
            for rank in range(world_size):
                launch = Launch(rank=rank, world_size=world_size, local_rank=rank, master_addr=address)
                reader, writer = context.Pipe(duplex=False)
                worker = context.Process(target=_worker, args=(func, launch, args, writer))
                worker.start()
                writer.close()
                readers.append(reader)
                workers.append(worker)
            return _collect(readers, timeout_s=timeout_s)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            for reader in readers:
                reader.close()


def _worker(func: Callable[..., Any], launch: Launch, args: tuple, writer: Connection) -> None:
    # The kernel kills this process when the parent dies, however it dies.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Threads of the parent do not survive the fork: neither its pool, nor those that destructors of its garbage would wait for.
    torch.set_num_threads(1)
    gc.freeze()
    try:
        message = (True, func(launch, *args))
    except BaseException:
        message = (False, traceback.format_exc())
    # Not writer.send: torch would pass tensors as shared memory of a process that is about to end.
    writer.send_bytes(pickle.dumps(message))
    os._exit(0)


def _collect(readers: Sequence[Connection], *, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(readers)) if rank not in results]
            raise ParallelError(f"ranks {late} of {len(readers)} were still running after {timeout_s} s; killed")
        for rank in (rank for rank, reader in enumerate(readers) if reader in ready):
            try:
                # Written by _worker of this call, in a pipe that nobody else holds.
                succeeded, value = pickle.loads(readers[rank].recv_bytes())  # noqa: S301
            except EOFError:
                raise ParallelError(f"rank {rank} of {len(readers)} died without a result (killed, or crashed in native code)") from None
            if not succeeded:
                raise ParallelError(f"rank {rank} of {len(readers)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]
