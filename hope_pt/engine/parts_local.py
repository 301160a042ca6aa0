"""Provider "local": megatron's linears, our norm, torch's AdamW."""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_pt.nn.parts import RMSNorm


class Norm(RMSNorm):
    """RMSNorm whose weight is marked for megatron's sequence parallelism: its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any):
        super().__init__(hidden_size, eps)
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel


class Column(ColumnParallelLinear):
    """Column-parallel linear layer x [T, B, in] -> y [T, B, out / tensor-parallel degree]."""

    def __init__(self, config: TransformerConfig, width_in: int, width_out: int, *, tp_group: torch.distributed.ProcessGroup):
        super().__init__(width_in, width_out, config=config, init_method=None, bias=False, gather_output=False, tp_group=tp_group)

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's own forward also returns a bias, which is None here."""
        return super().forward(x)[0]


class Row(RowParallelLinear):
    """Row-parallel linear layer x [T, B, in / tensor-parallel degree] -> y [T, B, out]."""

    def __init__(self, config: TransformerConfig, width_in: int, width_out: int, *, tp_group: torch.distributed.ProcessGroup):
        options = {"config": config, "init_method": None, "bias": False, "tp_group": tp_group}
        super().__init__(width_in, width_out, input_is_parallel=True, skip_bias_add=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's own forward also returns a bias, which is None here."""
        return super().forward(x)[0]


def adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW of torch, in one kernel for all tensors of a group."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
