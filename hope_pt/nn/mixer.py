"""A sequence mixer: one input projection, a head-local core, one output projection.

A core is an `nn.Module` built as Core(config, num_heads=...) with `features_per_head`, `init_state(batch, *, dtype, device, past)` and
`forward(projected_BTP, *, state, layout, keep_state) -> (y, state)`. All its parameters are head-first, and it takes the number of heads
from its parameters or its input, so that an engine can run it on some of its heads. Adding a mixer is one file and one line in
`CORES`.
"""

import torch
from torch import nn

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.attention import AttentionCore
from hope_pt.nn.layout import Layout
from hope_pt.nn.parts import Parts
from hope_pt.nn.state import LayerState
from hope_pt.nn.titans import TitansCore

CORES: dict[str, type[TitansCore] | type[AttentionCore]] = {"titans": TitansCore, "attention": AttentionCore}


class Mixer(nn.Module):
    """x [B, T, D] -> [B, T, D] ([T, B, D] where parts.time_first). The input projection's rows are interleaved per head."""

    def __init__(self, config: ModelConfig, *, parts: Parts):
        super().__init__()
        self.core: TitansCore | AttentionCore = CORES[config.mixer](config, num_heads=parts.num_heads)
        self.time_first, self.run_core = parts.time_first, parts.run_core
        self.in_proj = parts.column(config.width, config.num_heads * self.core.features_per_head)
        self.out_proj = parts.row(config.width, config.width)

    def forward(self, x: torch.Tensor, *, state: LayerState | None = None, layout: Layout | None = None, keep_state: bool = False):
        """(y like x, the new state or None); see `TitansCore.forward`."""
        y, state = self.run_core(self.core, self.project(x), state=state, layout=layout, keep_state=keep_state)
        return self.out_proj(y.transpose(0, 1) if self.time_first else y), state

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The core's input, [B, T, H * features_per_head]."""
        projected = self.in_proj(x)
        return projected.transpose(0, 1) if self.time_first else projected
