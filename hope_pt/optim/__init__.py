"""The outer optimizer in plain torch: which parameter gets what (groups), when it steps (clocks), how fast (schedule)."""

from hope_pt.optim.clocks import Clocked
from hope_pt.optim.groups import Group, Rule, group_parameters, rule_of, table
from hope_pt.optim.schedule import learning_rate

__all__ = ["Clocked", "Group", "Rule", "group_parameters", "learning_rate", "rule_of", "table"]
