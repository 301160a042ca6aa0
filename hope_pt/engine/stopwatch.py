"""How long a rank computes in a step before it waits for the others: from the start of the forward pass to the gradients' reduction.

On a GPU two events in the stream, read after the step has waited for the device anyway; on a CPU the clock. Data-parallel ranks do not wait
for each other in this time, so a slow one shows. Ranks of one model (tensor, pipeline, context) do, within their layers, and share it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Started by the step, stopped by the reduction that comes first."""

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        """The forward pass begins."""
        self._mark(0)

    def before(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        """`reduce`, which stops the watch when it is called."""

        def stopped(*args: Any, **kwargs: Any) -> Any:
            self._mark(1)
            return reduce(*args, **kwargs)

        return stopped

    @property
    def seconds(self) -> float:
        """Between the last start and the stop after it."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()
