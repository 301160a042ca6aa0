"""The choice of an implementation: made once, forceable; whoever runs the model logs it.

"triton" is what a GPU runs, "chunked" plain torch for every device, "reference" the token recurrence that the others are tested against.
"""

import functools
import importlib.util

import torch

from hope_kernels.rule import MemoryRule
from hope_kernels.tuning import table, tuning


def choose(name: str, *, backend: str, obstacle: str, available: tuple[str, ...] = ("triton", "chunked", "reference")) -> str:
    """The implementation of operation `name` for a requested backend.

    obstacle: why Triton's cannot run here, "" if it can. "auto" takes Triton where nothing is in the way, else plain torch. Raises
    ValueError naming what is available, or the obstacle, when a forced backend is not.
    """
    if backend == "auto":
        return "chunked" if obstacle else "triton"
    if backend not in available:
        raise ValueError(f'{name} has no backend "{backend}" here; available: {", ".join(available)}')
    if backend == "triton" and obstacle:
        raise ValueError(f'{name}: backend "triton" cannot run here: {obstacle}; use "auto" or "chunked"')
    return backend


def triton_obstacle(device: torch.device) -> str:
    """Why Triton kernels cannot run on a device, or "".

    On a CPU they run in Triton's interpreter, for tests, where that is switched on. On the meta device nothing is launched: their operators
    know the shapes of their results.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type in ("cuda", "meta"):
        return ""
    from hope_kernels.triton_support import interpreted

    return "" if device.type == "cpu" and interpreted() else f"the device is {device.type}, not cuda"


CONV_WIDTH = 4
"""Taps of the convolution that has a kernel."""


def scan_obstacle(rule: MemoryRule, *, width: int, hidden: int, conv_width: int = CONV_WIDTH) -> str:
    """Why Triton does not compute the scans of a rule at head width K and hidden width F, or the convolution before them, or ""."""
    if conv_width != CONV_WIDTH:
        return f"a convolution of width {conv_width} has no kernel"
    if rule.objective == "dot":
        return 'objective = "dot" has no kernel'
    if rule.momentum:
        return 'momentum = "titans" has no kernel'
    if rule.memory == "mlp" and rule.erases(1):
        return 'dgd_scope = "layerwise" has no kernel'
    if tuning(width=width, hidden=hidden if rule.memory == "mlp" else width) is None:
        largest = "x".join(str(n) for n in max(table()))
        return f"memories of {width}x{hidden} are larger than the largest kernel, {largest}"
    return ""


@functools.cache
def scan_backend(
    backend: str, *, rule: MemoryRule, width: int, hidden: int, device: torch.device, conv_width: int = CONV_WIDTH
) -> tuple[str, str]:
    """(implementation of both memory scans, what keeps Triton's from being used or "").

    width, hidden: head width K and hidden width F. Off a GPU "auto" is plain torch even where the kernels could be run or followed.
    Raises ValueError for a forced backend that cannot run.
    """
    obstacle = triton_obstacle(device) or scan_obstacle(rule, width=width, hidden=hidden, conv_width=conv_width)
    if backend == "auto" and device.type != "cuda":
        return "chunked", obstacle or f"the device is {device.type}, not cuda"
    return choose("memory scans", backend=backend, obstacle=obstacle), obstacle
