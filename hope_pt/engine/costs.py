"""What one update of a parameter costs, by formula: the balance of layer-wise ranks, and the planner's count."""

import math
from collections.abc import Mapping

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import ModelConfig
from hope_pt.optim.groups import Group, group_parameters
from hope_pt.optim.rules import make_rule

ELEMENT_FLOPS = 4096
"""What an element costs beside the products, in FLOPs: some 40 bytes of weights and state are read and written, and in the time of a byte
a GPU does about 100 FLOPs of a large bf16 product."""


def update_flops(shape: tuple[int, ...], group: Group, *, optim: OptimConfig) -> float:
    """Matrix products in one update of a whole parameter of the group."""
    if group.view is None:
        return 0.0
    rule = make_rule(group.rule.optimizer, optim=optim)
    return math.prod(group.view.lead(shape)) * rule.flops(max(group.view.rows(shape)), shape[-1])


def update_costs(shapes: Mapping[str, tuple[int, ...]], *, model: ModelConfig, optim: OptimConfig) -> dict[str, float]:
    """Cost in FLOPs of one update of every whole parameter, elements included."""
    return {
        name: update_flops(shapes[name], group, optim=optim) + ELEMENT_FLOPS * math.prod(shapes[name])
        for group in group_parameters(shapes, config=model, optim=optim)
        for name in group.names
    }
