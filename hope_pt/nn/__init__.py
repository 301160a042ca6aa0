"""The mathematics in plain torch: mixers, CMS, block, language model, state, initial values. No torch.distributed, no run configuration."""

from hope_pt.nn.block import HopeBlock
from hope_pt.nn.lm import HopeLM, model_layout
from hope_pt.nn.parts import Parts
from hope_pt.nn.state import LMState

__all__ = ["HopeBlock", "HopeLM", "LMState", "Parts", "model_layout"]
