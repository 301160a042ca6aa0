"""Convolution with SiLU and norm with gate in torch's own operations: the specification of both (SPEC 1, 2).

Legend: B batch, T tokens, H heads, X convolved features of a head, K head width, W convolution width.
"""

import torch
import torch.nn.functional as F


def conv_silu(x_BTHX: torch.Tensor, weight_HXW: torch.Tensor) -> torch.Tensor:
    """See `hope_kernels.pointwise.chunked.conv_silu`."""
    length, taps = x_BTHX.shape[1], weight_HXW.shape[-1]
    features_BXT = x_BTHX.flatten(2).mT
    kernel = weight_HXW.flatten(0, 1).unsqueeze(1)
    conv = F.conv1d(F.pad(features_BXT, (taps - 1, 0)), kernel, groups=len(kernel))[..., :length]
    return F.silu(conv).mT.unflatten(-1, x_BTHX.shape[2:])


def norm_gate(y_BTHK: torch.Tensor, weight_HK: torch.Tensor, gate_BTHK: torch.Tensor, *, eps: float) -> torch.Tensor:
    """See `hope_kernels.pointwise.chunked.norm_gate`."""
    return F.rms_norm(y_BTHK, y_BTHK.shape[-1:], None, eps) * weight_HK * F.silu(gate_BTHK)
