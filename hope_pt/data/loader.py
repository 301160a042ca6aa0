"""The loader: consecutive global batches, of which each data-parallel rank reads its rows; optionally read ahead by worker processes.

Global batch s holds the samples at positions s * G .. s * G + G - 1 after `start_sample`; rank r takes the rows g with g % dp_size == r.
Worker w reads the steps w, w + N, w + 2N, ...; the batches are those of zero workers. All state is `consumed`.
"""

import atexit
import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from hope_pt.config.schema import DataConfig
from hope_pt.data.batch import Batch, Rows
from hope_pt.data.order import SampleOrder
from hope_pt.data.source import Source
from hope_pt.errors import ConfigError, DataError
from hope_pt.signals import shielded

LOG = logging.getLogger(__name__)
_AHEAD = 2  # batches each worker prepares before they are asked for
_POLL_SECONDS = 1.0


class Loader:
    """Iterator without end over one rank's `Batch`es of global_batch_size / dp_size rows.

    `consumed` counts global samples handed out; a new Loader with start_sample = consumed continues exactly, for any dp_size and number
    of workers. Raises ConfigError if dp_size does not divide the batch, DataError if reading fails or a worker process dies.
    """

    def __init__(
        self, source: Source, *, config: DataConfig, global_batch_size: int, dp_rank: int = 0, dp_size: int = 1, start_sample: int = 0
    ):
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(f"train.global_batch_size = {global_batch_size} is not a multiple of the data-parallel degree {dp_size}")
        if not 0 <= dp_rank < dp_size or start_sample < 0:
            raise ValueError(f"dp_rank = {dp_rank}, dp_size = {dp_size}, start_sample = {start_sample}")
        self.consumed = start_sample
        self._global_batch_size = global_batch_size
        order = SampleOrder(
            num_samples=source.num_samples, seed=config.seed, fingerprint=source.fingerprint, shuffle_block=config.shuffle_block
        )
        rows = np.arange(dp_rank, global_batch_size, dp_size)
        self._reader = _Reader(source, order, rows, start_sample, global_batch_size)
        self._pool = _Workers(self._reader, config.num_workers) if config.num_workers else None
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self._pool.get(self._step) if self._pool else self._reader.read(self._step)
        self._step += 1
        self.consumed += self._global_batch_size
        return rows.to_batch()

    def close(self) -> None:
        """Stop the workers; the source stays open."""
        if self._pool:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader:
    """Reads this rank's rows of step s: all that a worker needs to know."""

    def __init__(self, source: Source, order: SampleOrder, rows: np.ndarray, start: int, global_batch_size: int):
        self.source, self._order, self._rows, self._start, self._size = source, order, rows, start, global_batch_size

    def read(self, step: int) -> Rows:
        return self.source.read_rows(self._order(self._start + step * self._size + self._rows))


class _Workers:
    """Worker processes, each with a pipe on which it sends its steps in order; signals that ask a training to stop do not reach them."""

    def __init__(self, reader: _Reader, num_workers: int):
        # fork server: forked from a fresh process that has imported this once, so no locks or CUDA state of ours are copied
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        # At its own exit multiprocessing sends SIGTERM to what is left, and waits.
        atexit.register(self.close)
        with shielded():
            for w in range(num_workers):
                self._start(context, args=(reader, w, num_workers))

    def _start(self, context: Any, *, args: tuple[_Reader, int, int]) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(*args, theirs), name=f"hope-data-worker-{args[1]}", daemon=True)
        process.start()
        theirs.close()
        for _ in range(_AHEAD):
            ours.send(True)
        self._processes.append(process)
        self._pipes.append(ours)

    def get(self, step: int) -> Rows:
        """Rows of a step (each step once, in order); DataError if the worker died or failed."""
        w = step % len(self._pipes)
        pipe, process = self._pipes[w], self._processes[w]
        try:
            while not pipe.poll(_POLL_SECONDS):
                if not process.is_alive() and not pipe.poll(0):
                    raise EOFError
            kind, value = pipe.recv()
            pipe.send(True)
        except (EOFError, ConnectionError):
            process.join(_POLL_SECONDS)
            code = process.exitcode
            self.close()
            raise DataError(
                f"data worker {w} (pid {process.pid}) died with exit code {code}; resume, with fewer data.num_workers if memory ran out"
            ) from None
        if kind == "rows":
            return value
        self.close()
        if kind == "data error":
            raise DataError(f"data worker {w}: {value}")
        raise RuntimeError(f"data worker {w} failed:\n{value}")

    def close(self) -> None:
        """Without its pipe a worker ends by itself, unless it is stuck in a read; takes at most two seconds for each."""
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_POLL_SECONDS)
            if process.is_alive():
                process.kill()
                process.join(_POLL_SECONDS)
            if process.is_alive():
                text = "%s (pid %d) does not die of SIGKILL: it waits for a disk; at its end this process waits for it"
                LOG.warning(text, process.name, process.pid)


def _work(reader: _Reader, first: int, stride: int, pipe: Connection) -> None:
    """Body of a worker: one step for every token on the pipe, until the pipe closes or the fork server (it goes with us) is gone."""
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    step = first
    try:
        while True:
            pipe.recv()
            try:
                pipe.send(("rows", reader.read(step)))
            except DataError as error:
                pipe.send(("data error", str(error)))
            except (EOFError, ConnectionError):
                raise
            except Exception:
                pipe.send(("failure", traceback.format_exc()))
            step += stride
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
