"""The continuum memory system as a network: a chain of SwiGLU levels, highest update frequency first (SPEC 3, sequential variant).

At which step a level's parameters move is the optimizer's affair (the stream clock, `hope_pt.optim.clocks`); forward and backward are
those of a stack of MLPs. A transformer's MLP is one level.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.parts import Parts


class CMSLevel(nn.Module):
    """x + W_down(silu(W_gate n) * W_up n) with n = norm(x); x [..., D]."""

    def __init__(self, config: ModelConfig, *, parts: Parts):
        super().__init__()
        self.norm = parts.norm(config.width, config.norm_eps)
        self.w_gate = parts.column(config.width, config.cms.hidden)
        self.w_up = parts.column(config.width, config.cms.hidden)
        self.w_down = parts.row(config.cms.hidden, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.w_down(F.silu(self.w_gate(n)) * self.w_up(n))


class CMS(nn.Module):
    """The chain of levels, residuals included: x [..., D] -> [..., D]."""

    def __init__(self, config: ModelConfig, *, parts: Parts):
        super().__init__()
        self.levels = nn.ModuleList([CMSLevel(config, parts=parts) for _ in config.cms.periods])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for level in self.levels:
            x = level(x)
        return x
