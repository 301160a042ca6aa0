"""Operators that launch Triton kernels; facts about the installed Triton, and its launches switched off."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.runtime.jit import KernelInterface

OnLaunch = Callable[[str, tuple[int, ...], dict[str, Any]], None]


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operator `hope_kernels::<name>` without side effects; its kernels run on the device of its tensors."""

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def guarded(*arguments, **named):
            given = (*arguments, *named.values())
            first = next(t for value in given for t in (value if isinstance(value, list | tuple) else [value]) if torch.is_tensor(t))
            with torch.cuda.device_of(first):  # Triton launches on the current device
                return function(*arguments, **named)

        return torch.library.custom_op(f"hope_kernels::{name}", guarded, mutates_args=())

    return register


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def without_launches(on_launch: OnLaunch) -> Iterator[None]:
    """Within it no kernel is compiled or run: a launch calls on_launch(kernel, grid, arguments by name) instead.

    Code that launches kernels can so be followed on the meta device. It holds for all threads of the process.
    """

    def launcher(kernel, grid):
        def launch(*arguments, **named):
            on_launch(kernel.fn.__name__, tuple(grid), dict(zip(kernel.arg_names, arguments, strict=False)) | named)

        return launch

    launches = KernelInterface.__getitem__
    KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launches
