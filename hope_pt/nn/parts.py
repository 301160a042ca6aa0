"""What a block is made of: projections and norms are injected, so the same block runs in plain torch and on megatron's parallel layers.

`Parts.local` is the plain choice. An engine gives its own: column-parallel layers return this rank's share of the output features,
row-parallel layers take this rank's share of the input features, and `num_heads` is this rank's number of heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in at least fp32; weight [width]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """RMS norm over weight's dimensions (the last ones of x); same dtype as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.rms_norm(x.to(wide), weight.shape[-1:], None, eps).mul(weight.to(wide)).to(x.dtype)


@dataclass(frozen=True)
class Parts:
    """Factories of the layers that a parallel engine replaces.

    column(in, out), row(in, out): modules x [..., in] -> [..., out] without bias. norm(width, eps): a module. num_heads: heads held
    here. time_first: activations are [T, B, D] instead of [B, T, D]. run_core(core, projected, state=, layout=, keep_state=): how a mixer's
    core is called; an engine that divides the sequence moves it here.
    """

    column: Callable[[int, int], nn.Module]
    row: Callable[[int, int], nn.Module]
    norm: Callable[[int, float], nn.Module]
    num_heads: int
    time_first: bool = False
    run_core: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor] | None]] = nn.Module.__call__

    @staticmethod
    def local(num_heads: int) -> "Parts":
        """Plain torch on one device."""
        return Parts(_linear, _linear, RMSNorm, num_heads)


def _linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)
