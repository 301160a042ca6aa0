"""Reads of a memory: both memories and both reads at the widths of the tuning table, and one padded width."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_read import triton_
from hope_kernels.tuning import padded, tuning
from tools.aot.case import Case

OPERANDS = torch.bfloat16
WIDTHS = (48, 64, 128)
SIGNALS = ("residual", "error", "hidden", "g", "m", "n")


def case(kernel: str, width: int, *, memory: str, read: str) -> Case:
    """One kernel at head and hidden width `width`, one tile a chunk."""
    entry = tuning(width=width, hidden=width)
    is_linear, is_causal = memory == "linear", read == "causal"
    gradients = () if kernel == "forward" else ("d_q", "d_w2", "d_w1", *(f"d_{name}" for name in SIGNALS))
    arguments: dict[str, Any] = dict.fromkeys(("q", "residual", "error", "hidden", "m", "n"), OPERANDS)
    arguments |= dict.fromkeys(("w2", "w1", "g", *gradients), torch.float32)
    absent = (() if is_causal else SIGNALS) + (("w1", "error", "hidden", "n") if is_linear else ())
    arguments |= {name: None for name in arguments if name.removeprefix("d_") in absent}
    arguments |= {"out" if kernel == "forward" else "d_out": OPERANDS}
    arguments |= {"tokens": 4096, "first_tile": 0, "num_tiles": 4096 // entry.tile}
    arguments |= {"K": width, "F": width, "BLOCK_K": padded(width), "BLOCK_F": padded(width)}
    arguments |= {"CHUNK": entry.tile, "TILE": entry.tile, "PER_CHUNK": 1, "LINEAR": is_linear, "CAUSAL": is_causal, "PRECISION": None}
    return Case(f"{kernel}_{memory}_{read}_{width}", getattr(triton_, f"_read_{kernel}"), arguments, entry.warps_of(f"read_{kernel}"))


def cases() -> list[Case]:
    """All of them."""
    kernels, memories = ("forward", "backward"), ("mlp", "linear")
    causal = [case(kernel, width, memory=memory, read="causal") for kernel, width, memory in product(kernels, WIDTHS, memories)]
    return causal + [case(kernel, width, memory="mlp", read="anchor") for kernel, width in product(kernels, WIDTHS[1:])]
