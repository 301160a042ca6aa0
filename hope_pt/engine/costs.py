"""What one update of a parameter costs, by formula: the balance of layer-wise ranks, and the planner's count.

A Newton-Schulz step of an m x n matrix, m <= n, is X X^T, A A and P X: 4 m^2 n + 2 m^3 FLOPs. (The Triton kernel computes half of the
symmetric products; this is the count without that.)
"""

import math
from collections.abc import Mapping

from hope_pt.config.schema import OptimConfig, OptimizerName, RunConfig
from hope_pt.optim.groups import group_parameters
from hope_pt.optim.matrices import View

ELEMENT_FLOPS = 4096
"""What an element costs beside the products, in FLOPs: some 40 bytes of weights and state are read and written, and in the time of a byte
a GPU does about 100 FLOPs of a large bf16 product."""


def newton_schulz_flops(rows: int, columns: int, *, steps: int) -> float:
    """Of one matrix."""
    short, long = sorted((rows, columns))
    return float(steps * (4 * short**2 * long + 2 * short**3))


def matrix_flops(optimizer: OptimizerName, rows: int, columns: int, *, optim: OptimConfig) -> float:
    """Matrix products in one update of a matrix [rows, columns], on the mean over the updates (M3's slow momentum is rarer)."""
    if optimizer == "muon":
        return newton_schulz_flops(rows, columns, steps=optim.muon.ns_steps)
    if optimizer == "m3":
        times = 1 + (1 / optim.m3.slow_every if optim.m3.slow_weight else 0)
        return times * newton_schulz_flops(rows, columns, steps=optim.m3.ns_steps)
    if optimizer in ("momentum", "delta_momentum"):
        short, long = sorted((rows, columns))
        delta = 4 * short**2 * long if optimizer == "delta_momentum" and optim.momentum.delta else 0
        return delta + (newton_schulz_flops(rows, columns, steps=5) if optim.momentum.preconditioner == "newton_schulz" else 0)
    if optimizer == "deep_momentum":
        output = newton_schulz_flops(rows, columns, steps=5) if optim.deep_momentum.output == "newton_schulz" else 0
        return 6 * rows * columns * optim.deep_momentum.hidden + output
    return 2 * rows * columns**2 if optimizer == "dgd" else 0.0


def update_flops(shape: tuple[int, ...], view: View | None, *, optimizer: OptimizerName, optim: OptimConfig) -> float:
    """Matrix products in one update of a whole parameter."""
    if view is None:
        return 0.0
    return math.prod(view.lead(shape)) * matrix_flops(optimizer, max(view.rows(shape)), shape[-1], optim=optim)


def update_costs(shapes: Mapping[str, tuple[int, ...]], *, config: RunConfig) -> dict[str, float]:
    """Cost in FLOPs of one update of every whole parameter, elements included."""
    return {
        name: update_flops(shapes[name], group.view, optimizer=group.rule.optimizer, optim=config.optim)
        + ELEMENT_FLOPS * math.prod(shapes[name])
        for group in group_parameters(shapes, config=config.model, optim=config.optim)
        for name in group.names
    }


def exchanged_tensors(optimizer: OptimizerName, *, optim: OptimConfig) -> float:
    """Tensors of the parameter's size that go to the rank which does the work or come back from it, in one update on the mean."""
    if optimizer == "muon":
        return 2.0
    if optimizer == "m3":
        return 2 + optim.m3.second_moment + (1 + 2 / optim.m3.slow_every if optim.m3.slow_weight else 0)
    if optimizer in ("momentum", "delta_momentum"):
        delta = 3 if optimizer == "delta_momentum" and optim.momentum.delta else 0
        return delta + (2 if optim.momentum.preconditioner == "newton_schulz" else 0)
    if optimizer == "deep_momentum":
        settings = optim.deep_momentum
        return (2 if settings.hidden else 0) + (2 if settings.output == "newton_schulz" else 0)
    return 3.0 if optimizer == "dgd" else 0.0
