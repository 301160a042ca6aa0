"""Linear sketches of parameters that are divided over ranks: the sum of the sketches of the parts is the sketch of the whole.

A count sketch (Charikar, Chen, Farach-Colton 2002) adds element i of a parameter to bucket h(i) with sign s(i), both hashes of i and the
parameter's name. i counts the elements of the whole parameter in row-major order, so any division gives the same sum. For sketches S:
<S(u), S(v)> = <u, v> + e, where e has mean 0 and at most the standard deviation sqrt((|u|^2 |v|^2 + <u, v>^2) / BUCKETS): a cosine near 0
is known to 1 / sqrt(BUCKETS) = 0.022, a norm to 1 / sqrt(2 BUCKETS) = 1.6 %. Nothing in this depends on the size or the structure of u.
"""

import hashlib

import torch
from torch import Tensor

from hope_pt.optim.held import Held

BUCKETS = 2048
# The multipliers of splitmix64 as signed integers, which wrap around.
_MIX = (-7046029254386353131, -4658895280553007687)


def sketch(held: Held, *values: Tensor) -> Tensor:
    """Sketches [V, BUCKETS] fp32 of tensors shaped like `held.main`: this rank's share of those of the whole tensors."""
    salt = int.from_bytes(hashlib.sha256(held.name.encode()).digest()[:5], "big")
    total = torch.zeros(len(values), BUCKETS, device=held.main.device)
    for numbers, parts in held.runs(*values):
        numbers += salt
        mixed = numbers * _MIX[0]
        mixed ^= mixed >> 32
        mixed *= _MIX[1]
        # The highest bits of a product are its best mixed ones. A product with signs is much faster on a CPU than a choice by them.
        buckets, signs = (mixed >> 40) & (BUCKETS - 1), ((mixed >> 63) | 1).float()
        for row, part in zip(total, parts, strict=True):
            row.scatter_add_(0, buckets, part * signs)
    return total
