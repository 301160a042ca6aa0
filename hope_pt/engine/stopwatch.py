"""How long a rank computes in a step before it waits for the others: from the start of the forward pass to the gradients' reduction.

On a GPU events in the stream, read after the step has waited for the device anyway; on a CPU the clock. Data-parallel ranks wait for each
other in this time only for parameters that are gathered during the forward pass (engine.overlap_param_gather), which is left out; so a
slow one shows. Ranks of one model (tensor, pipeline, context) wait for each other within their layers, and share this time.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class Stopwatch:
    """Started by the step, stopped by the reduction that comes first."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []  # start, stop, start, stop ...
        self._running = False

    def start(self) -> None:
        """The forward pass begins."""
        self._marks, self._running = [self._now()], True

    def before(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        """`reduce`, which stops the watch when it is called."""

        def stopped(*args: Any, **kwargs: Any) -> Any:
            self._marks.append(self._now())
            self._running = False
            return reduce(*args, **kwargs)

        return stopped

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it does not count."""
        if not self._running:
            yield
            return
        self._marks.append(self._now())
        yield
        self._marks.append(self._now())

    def leave_out_gathers(self, models: Sequence[DistributedDataParallel]) -> None:
        """Do not count the waits for parameters that megatron gathers during the forward pass."""
        for model in models:
            for group in model.bucket_groups:
                group.finish_param_sync = functools.partial(self._gather, group, group.finish_param_sync)

    def _gather(self, group: Any, finish: Callable[..., None], **options: Any) -> None:
        # megatron asks before every layer; it waits where the gathering of a bucket is under way, or has yet to begin.
        waits = group.param_gather_handle is not None or not group.param_gather_dispatched
        with self.paused() if waits else contextlib.nullcontext():
            finish(**options)

    @property
    def seconds(self) -> float:
        """Counted between the last start and the stop after it."""
        if self._on_gpu:
            self._marks[-1].synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(start.elapsed_time(stop) / 1e3 if self._on_gpu else stop - start for start, stop in pairs)

    def _now(self) -> Any:
        """Seconds, or an event that the stream records here."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
