"""The deep rules of the outer optimizer (SPEC 4), by their names in the configuration."""

from collections.abc import Callable

from hope_pt.config.schema import OptimConfig, OptimizerName
from hope_pt.optim.rules.base import NewtonSchulz, Step, UpdateRule
from hope_pt.optim.rules.muon import Muon

__all__ = ["Muon", "NewtonSchulz", "Step", "UpdateRule", "make_rule"]

_RULES: dict[OptimizerName, Callable[[OptimConfig], UpdateRule]] = {
    "muon": lambda optim: Muon(optim.muon),
}


def make_rule(name: OptimizerName, *, optim: OptimConfig) -> UpdateRule:
    """The rule `name` with its settings; KeyError for "adamw", which is no deep rule."""
    return _RULES[name](optim)
