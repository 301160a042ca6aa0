"""Head and loss: the two kernels over a block of logits; no products in them."""

import torch

from hope_kernels.linear_cross_entropy import triton_ as loss
from tools.aot.case import Case

COLUMNS = 2048


def cases() -> list[Case]:
    """Both kernels, for aligned rows of logits and for a vocabulary whose last block is not a multiple of 16."""
    found = []
    for name, columns in (("", COLUMNS), ("_rest", COLUMNS - 3)):
        settings = {"logits_ptr": torch.bfloat16, "targets_ptr": torch.int64, "columns": columns, "BLOCK": loss.BLOCK}
        statistics = {"lse_ptr": torch.float32, "at_target_ptr": torch.float32}
        gradient = {"lse_ptr": torch.float32, "d_lse_ptr": torch.float32, "d_at_target_ptr": torch.float32}
        for kernel, outputs in ((loss.statistics_kernel, statistics), (loss.gradient_kernel, gradient)):
            label = kernel.__name__.removesuffix("_kernel") + name
            found.append(Case(label, kernel, {**settings, **outputs}, loss.WARPS, min_mma=0, max_registers=64))
    return found
