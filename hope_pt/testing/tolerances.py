"""Named tolerances of the tests, each with its reason, and the measure they apply to."""

from collections.abc import Mapping

import torch
from torch import Tensor

LAYOUT = 1e-6
"""Same mathematics in fp32, another order of summation: data-parallel ranks, micro-batches, megatron's linear layers. For losses, and
for all gradients or all parameters of a run together."""
GRADIENT = 3e-5
"""Gradients of one parameter alone (that of a gate's bias is a sum over tokens whose terms cancel to a tenth), and gradients taken after
steps, at weights that already differ by LAYOUT."""
ROUNDING = 2.0
"""Factor over the fp32 oracle's own distance from float64: another fp32 computation of the same numbers stays as near to the truth."""
BF16_LOSS = 2e-3
"""First loss in bf16 against fp32: 8 bits of mantissa, averaged over tokens."""
BF16_GRADIENT = 6e-2
"""First gradient norm in bf16 against fp32: rounding of every activation, through the scans' backward pass."""
EXACT = 0.0
"""Same operations on the same numbers: bit for bit."""


def difference(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """|values - reference| / |reference|, the norm over all named tensors together. KeyError if the names differ."""
    _same_names(values, reference)
    gap = torch.stack([(values[name].double() - reference[name].double()).norm() for name in reference]).norm()
    return float(gap / torch.stack([tensor.double().norm() for tensor in reference.values()]).norm())


def worst_difference(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `difference` of one tensor alone, and its name."""
    _same_names(values, reference)
    return max((difference({name: values[name]}, {name: reference[name]}), name) for name in reference)


def _same_names(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    if values.keys() != reference.keys():
        raise KeyError(f"names differ: {sorted(values.keys() ^ reference.keys())}")
