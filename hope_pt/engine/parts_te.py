"""Provider "te": transformer-engine, through megatron's own adapters, which know its versions. Imported only where it is chosen."""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam

from hope_pt.engine.fused_adam import step_per_parameter

# A class that gives transformer-engine's RMSNorm. Its weight has the dtype of the activations; the optimizer has the fp32 master.
Norm = TENorm


class Column(TEColumnParallelLinear):
    """Column-parallel linear layer x [T, B, in] -> y [T, B, out / tensor-parallel degree]."""

    def __init__(self, config: TransformerConfig, width_in: int, width_out: int, *, tp_group: torch.distributed.ProcessGroup):
        super().__init__(width_in, width_out, gather_output=False, **_options(config, tp_group))

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's adapter also returns a bias, which is None here."""
        return super().forward(x)[0]


class Row(TERowParallelLinear):
    """Row-parallel linear layer x [T, B, in / tensor-parallel degree] -> y [T, B, out]."""

    def __init__(self, config: TransformerConfig, width_in: int, width_out: int, *, tp_group: torch.distributed.ProcessGroup):
        super().__init__(width_in, width_out, input_is_parallel=True, **_options(config, tp_group))

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's adapter also returns a bias, which is None here."""
        return super().forward(x)[0]


def adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """FusedAdam with decoupled weight decay, on the fp32 masters that megatron's wrapper keeps."""
    return step_per_parameter(FusedAdam)(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)


def _options(config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> dict[str, Any]:
    # Initial values come by name (engine.state); megatron asks for a function all the same.
    return {"config": config, "init_method": None, "bias": False, "skip_bias_add": False, "is_expert": False, "tp_group": tp_group}
