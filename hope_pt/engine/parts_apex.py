"""Provider "apex": megatron's linears, NVIDIA apex's norm and Adam. Imported only where it is chosen."""

from typing import Any

import torch
from apex.normalization import MixedFusedRMSNorm
from apex.optimizers import FusedAdam
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_pt.engine.fused_adam import step_per_parameter
from hope_pt.engine.parts_local import Column as Column
from hope_pt.engine.parts_local import Row as Row


class Norm(MixedFusedRMSNorm):
    """RMSNorm with an fp32 weight marked for megatron's sequence parallelism; the output has the dtype of the input."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Output in the dtype of x; apex's "mixed" norm gives the dtype of the weight."""
        return super().forward(x).to(x.dtype)


def adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """FusedAdam with decoupled weight decay."""
    return step_per_parameter(FusedAdam)(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
