"""The mathematics in plain torch: mixers, CMS, block, language model, state, initial values. No torch.distributed, no run configuration."""

from hope_pt.nn.block import HopeBlock
from hope_pt.nn.diagnostics import diagnostics
from hope_pt.nn.lm import HopeLM, model_layout
from hope_pt.nn.parts import Parts
from hope_pt.nn.state import LMState
from hope_pt.nn.summary import count_parameters, flops_per_token, parameter_class, state_bytes

__all__ = [
    "HopeBlock", "HopeLM", "LMState", "Parts", "count_parameters", "diagnostics", "flops_per_token", "model_layout", "parameter_class",
    "state_bytes",
]  # fmt: skip
