"""The choice of an implementation: made once, forceable; whoever runs the model logs it.

"triton" is what a GPU runs, "chunked" plain torch for every device, "reference" the token recurrence that the others are tested against.
"""

import functools
import importlib.util

import torch

from hope_kernels.rule import MemoryRule


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

    On a CPU they run in Triton's interpreter, for tests, where that is switched on.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return ""
    from hope_kernels.triton_support import interpreted

    return "" if device.type == "cpu" and interpreted() else f"the device is {device.type}, not cuda"


@functools.cache
def scan_backend(backend: str, *, rule: MemoryRule, width: int, hidden: int, device: torch.device) -> tuple[str, str]:
    """(implementation of both memory scans, what keeps Triton's from being used or "").

    width, hidden: head width K and hidden width F. On a CPU "auto" is plain torch even where the interpreter could run the kernels.
    Raises ValueError for a forced backend that cannot run.
    """
    obstacle = triton_obstacle(device)
    if not obstacle:
        from hope_kernels.triton_support import scan_obstacle

        obstacle = scan_obstacle(rule, width=width, hidden=hidden)
    if backend == "auto" and device.type != "cuda":
        return "chunked", obstacle or "the device is cpu, not cuda"
    return choose("memory scans", backend=backend, obstacle=obstacle), obstacle
