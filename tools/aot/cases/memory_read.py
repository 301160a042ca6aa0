"""Reads of a memory: both memories and both reads at the widths of the tuning table, and one padded width."""

from itertools import product
from typing import Any

import torch

from hope_kernels.memory_read import triton_
from hope_kernels.tuning import padded
from tools.aot.case import Case
from tools.aot.memories import OPERANDS, TOKENS, entry, small

WIDTHS = (48, 64, 128)
SIGNALS = ("residual", "error", "hidden", "g", "m", "n")
MOMENTUM = ("s2", "s1", "delta", "kappa", "m_delta")
GRADIENTS = ("q", "w2", "w1", "weights", "written", "factor", "mixing", *SIGNALS, *MOMENTUM)


def case(kernel: str, width: int, *, memory: str, read: str, momentum: bool = False) -> Case:
    """One kernel at head and hidden width `width`, one tile a chunk."""
    found = entry(width)
    function = getattr(triton_, f"_{kernel}")
    arguments: dict[str, Any] = dict.fromkeys(("q", "d_out", "d_z", "w2", "w1", *SIGNALS, *MOMENTUM), OPERANDS)
    arguments |= dict.fromkeys(("weights", "written", "mixing", "d_rest"), OPERANDS)
    arguments |= dict.fromkeys(("g", "kappa", "factor", *(f"d_{name}" for name in GRADIENTS)), torch.float32)
    absent = (() if read == "causal" else SIGNALS) + (("w1", "error", "hidden", "n") if memory == "linear" else ())
    absent += () if momentum else MOMENTUM
    arguments |= {name: None for name in arguments if name.removeprefix("d_") in absent}
    arguments |= {"out": OPERANDS, "tokens": TOKENS, "first_tile": 0, "num_tiles": TOKENS // found.tile}
    arguments |= {"K": width, "F": width, "BLOCK_K": padded(width), "BLOCK_F": padded(width)}
    arguments |= {"CHUNK": found.tile, "TILE": found.tile, "PER_CHUNK": 1, "CAUSAL": read == "causal"}
    arguments |= {"ADDS": True, "PRECISION": None}
    arguments = {name: arguments[name] for name in function.arg_names}
    warps = found.warps_of("read_forward" if kernel == "read_forward" else "read_backward")
    return Case(f"{kernel}_{memory}_{'momentum' if momentum else read}_{width}", function, arguments, warps, hmma_reason=small(found.tile))


def cases() -> list[Case]:
    """All of them."""
    kinds = [("read_forward", "mlp"), ("read_forward", "linear"), ("outer_backward", "mlp"), ("inner_backward", "mlp")]
    causal = [case(kernel, width, memory=memory, read="causal") for (kernel, memory), width in product(kinds, WIDTHS)]
    of_mlp = list(product(("read_forward", "outer_backward"), WIDTHS[1:]))
    anchor = [case(kernel, width, memory="mlp", read="anchor") for kernel, width in of_mlp]
    return causal + anchor + [case(kernel, width, memory="mlp", read="causal", momentum=True) for kernel, width in of_mlp]
