"""The deep rules of the outer optimizer (SPEC 4), by their names in the configuration. A new rule is one file and one line here."""

from collections.abc import Callable

from hope_pt.config.optim import OptimConfig, OptimizerName
from hope_pt.optim.rules.base import NewtonSchulz, Step, UpdateRule
from hope_pt.optim.rules.deep_momentum import DeepMomentum
from hope_pt.optim.rules.dgd import DGD
from hope_pt.optim.rules.m3 import M3
from hope_pt.optim.rules.momentum import Momentum
from hope_pt.optim.rules.muon import Muon

__all__ = ["DGD", "M3", "DeepMomentum", "Momentum", "Muon", "NewtonSchulz", "Step", "UpdateRule", "make_rule"]

_RULES: dict[OptimizerName, Callable[[OptimConfig], UpdateRule]] = {
    "muon": lambda optim: Muon(optim.muon),
    "m3": lambda optim: M3(optim.m3),
    "momentum": lambda optim: Momentum(optim.momentum, delta=0.0),
    "delta_momentum": lambda optim: Momentum(optim.momentum, delta=optim.momentum.delta),
    "deep_momentum": lambda optim: DeepMomentum(optim.deep_momentum),
    "dgd": lambda _: DGD(),
}


def make_rule(name: OptimizerName, *, optim: OptimConfig) -> UpdateRule:
    """The rule `name` with its settings; KeyError for "adamw", which is no deep rule."""
    return _RULES[name](optim)
