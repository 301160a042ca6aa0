"""The outer optimizer in plain torch: which parameter gets what (groups), by which rule (deep), when (clocks), how fast (schedule)."""

from hope_pt.optim.clocks import Clocked
from hope_pt.optim.deep import DeepOptimizer
from hope_pt.optim.groups import Group, Rule, group_parameters, rule_of, table
from hope_pt.optim.matrices import Matrices, View, view_of
from hope_pt.optim.rules import make_rule
from hope_pt.optim.schedule import learning_rate

__all__ = [
    "Clocked",
    "DeepOptimizer",
    "Group",
    "Matrices",
    "Rule",
    "View",
    "group_parameters",
    "learning_rate",
    "make_rule",
    "rule_of",
    "table",
    "view_of",
]
