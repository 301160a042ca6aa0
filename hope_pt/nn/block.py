"""The HOPE block (SPEC 1): x + mixer(norm(x)), then the CMS."""

import torch
from torch import nn

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.cms import CMS
from hope_pt.nn.layout import Layout
from hope_pt.nn.mixer import Mixer
from hope_pt.nn.parts import Parts
from hope_pt.nn.state import LayerState


class HopeBlock(nn.Module):
    """x [B, T, D] -> [B, T, D] ([T, B, D] where parts.time_first)."""

    def __init__(self, config: ModelConfig, *, parts: Parts | None = None):
        super().__init__()
        parts = parts or Parts.local(config.num_heads)
        self.norm = parts.norm(config.width, config.norm_eps)
        self.mixer = Mixer(config, parts=parts)
        self.cms = CMS(config, parts=parts)

    def forward(self, x: torch.Tensor, *, state: LayerState | None = None, layout: Layout | None = None, keep_state: bool = False):
        """(y like x, the mixer's new state or None); see `TitansCore.forward`."""
        mixed, state = self.mixer(self.norm(x), state=state, layout=layout, keep_state=keep_state)
        return self.cms(x + mixed), state
