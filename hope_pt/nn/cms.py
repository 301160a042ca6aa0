"""The continuum memory system as a network: SwiGLU levels, highest update frequency first (SPEC 3, NL eq. 70-74).

    sequential, nested   y_0 = x, y_l = y_{l-1} + MLP_l(norm_l(y_{l-1}))          a chain
    independent          y = x + sum_l w_l MLP_l(norm_l(x))                        NL eq. 74 with a learned weighted sum as Agg

At which step a level's parameters move, and to which state a nested level returns, is the optimizer's affair (the stream clock,
`hope_pt.optim.clocks` and `hope_pt.optim.nested`); forward and backward are those of a stack of MLPs. A transformer's MLP is one level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.parts import Parts


class CMSLevel(nn.Module):
    """x + branch(x); x [..., D]."""

    def __init__(self, config: ModelConfig, *, parts: Parts):
        super().__init__()
        self.norm = parts.norm(config.width, config.norm_eps)
        self.w_gate = parts.column(config.width, config.cms.hidden)
        self.w_up = parts.column(config.width, config.cms.hidden)
        self.w_down = parts.row(config.cms.hidden, config.width)
        self.scale: nn.Parameter | None = None
        if config.cms.variant == "independent":
            self.scale = nn.Parameter(torch.ones(1))
            # What an engine marks on the norm's weight (that every rank sees a part of the sequence only) holds for this one too.
            vars(self.scale).update(vars(self.norm.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """W_down(silu(W_gate n) * W_up n) with n = norm(x), times the level's weight where it has one."""
        n = self.norm(x)
        y = self.w_down(F.silu(self.w_gate(n)) * self.w_up(n))
        return y if self.scale is None else y * self.scale.to(y.dtype)


class CMS(nn.Module):
    """The levels, residuals included: x [..., D] -> [..., D]."""

    def __init__(self, config: ModelConfig, *, parts: Parts):
        super().__init__()
        self.levels: Sequence[CMSLevel] = nn.ModuleList([CMSLevel(config, parts=parts) for _ in config.cms.periods])  # type: ignore[assignment]
        self.is_chain = config.cms.variant != "independent"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for level in self.levels:
            y = y + level.branch(y if self.is_chain else x)
        return y
