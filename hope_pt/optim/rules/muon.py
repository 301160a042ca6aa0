"""Muon: Nesterov momentum, orthogonalised (K. Jordan et al. 2024; NL section 4 reads it as momentum with a nonlinear output).

    M <- b M + (1 - b) G;   O = NS((1 - b) G + b M);   W <- W - lr s O

s is 0.2 sqrt(max(R, C)), which gives O the root mean square of AdamW's updates ("rms"), or sqrt(max(1, R / C)) ("spectral"). These are
"match_rms_adamw" and "original" of torch.optim.Muon.
"""

import math

from torch import Tensor

from hope_pt.config.optim import MuonConfig
from hope_pt.optim.rules.base import ADAMW_RMS, NewtonSchulz, Step, UpdateRule, rms_scale


def reference(grad: Tensor, momentum: Tensor, *, config: MuonConfig, orthogonalise: NewtonSchulz) -> tuple[Tensor, Tensor]:
    """One update of one matrix [R, C]: (direction, the new momentum)."""
    b, (rows, columns) = config.momentum, grad.shape
    momentum = b * momentum + (1 - b) * grad
    ahead = b * momentum + (1 - b) * grad if config.nesterov else momentum
    scale = ADAMW_RMS * math.sqrt(max(rows, columns)) if config.scale == "rms" else math.sqrt(max(1.0, rows / columns))
    return -scale * orthogonalise(ahead), momentum


class Muon(UpdateRule):
    """The batched form; state "momentum"."""

    keys = ("momentum",)
    orthogonalises = True
    exchanged = 2.0

    def __init__(self, config: MuonConfig, *, orthogonalise: NewtonSchulz | None = None):
        self.config = config
        self.orthogonalise = orthogonalise or NewtonSchulz(config.ns_steps)

    @property
    def width_exponent(self) -> float:
        """See `UpdateRule.width_exponent`."""
        return 0.5 if self.config.scale == "rms" else 0.0

    def flops(self, rows: int, columns: int) -> float:
        """See `UpdateRule.flops`."""
        return self.orthogonalise.flops(rows, columns)

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        b = self.config.momentum
        momentum = state["momentum"].lerp_(grads, 1 - b)
        ahead = grads.lerp(momentum, b) if self.config.nesterov else momentum

        def direct(ahead_MRC: Tensor, rows_M: Tensor) -> tuple[Tensor]:
            columns = ahead_MRC.shape[-1]
            scale = ADAMW_RMS * rms_scale(rows_M, columns) if self.config.scale == "rms" else (rows_M / columns).clamp(min=1.0).sqrt()
            return (self.orthogonalise(ahead_MRC).mul_(-scale),)

        (direction,) = step.matrices.apply(direct, ahead, constants=[step.matrices.rows(grads)])
        return direction
