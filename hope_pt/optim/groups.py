"""Which parameter gets what (SPEC 4): groups of the outer optimizer by rule on the canonical names of `hope_pt.nn`.

| class     | parameters                                                             | weight decay | period  |
|-----------|------------------------------------------------------------------------|--------------|---------|
| matrix    | in_proj, out_proj of the mixers                                        | yes          | 1       |
| memory    | initial states of the fast-weight memories                             | no           | 1       |
| gate      | all other per-head parameters: readouts, biases, convolutions, norms   | no           | 1       |
| norm      | weights of the norms before the mixer and the head                     | no           | 1       |
| embedding | embedding and untied head                                              | no           | 1       |
| cms       | the matrices of CMS level l                                            | yes          | n_l     |
| cms-norm  | the norm of CMS level l                                                | no           | n_l     |

A level's norm belongs to its level: a frozen level computes the same function until its clock ticks. Initial states of memories are
started by gradient descent in every sequence and are not decayed towards zero, which is not where they start.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hope_pt.config.schema import ModelConfig

_LEVEL = re.compile(r"\.cms\.levels\.(\d+)\.")
_MEMORY = re.compile(r"\.core\.(mem|proj)_weights\.")


@dataclass(frozen=True)
class Rule:
    """What one parameter gets."""

    kind: str
    decay: bool
    period: int = 1


@dataclass(frozen=True)
class Group:
    """Parameters that share a rule, in the order in which they were given."""

    rule: Rule
    names: tuple[str, ...]


def rule_of(name: str, *, ndim: int, config: ModelConfig) -> Rule:
    """Rule of the parameter with canonical name `name` and `ndim` dimensions."""
    level = _LEVEL.search(name)
    if level:
        period = config.cms.periods[int(level.group(1))]
        return Rule("cms", True, period) if ndim > 1 else Rule("cms-norm", False, period)
    if name in ("embedding.weight", "head.weight"):
        return Rule("embedding", False)
    if name.endswith(("in_proj.weight", "out_proj.weight")):
        return Rule("matrix", True)
    if name.endswith("norm.weight") and ndim == 1:
        return Rule("norm", False)
    return Rule("memory", False) if _MEMORY.search(name) else Rule("gate", False)


def group_parameters(shapes: Mapping[str, Iterable[int]], *, config: ModelConfig) -> list[Group]:
    """Groups of the parameters with the given canonical names and shapes, in the order of first appearance."""
    members: dict[Rule, list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault(rule_of(name, ndim=len(tuple(shape)), config=config), []).append(name)
    return [Group(rule, tuple(names)) for rule, names in members.items()]


def table(shapes: Mapping[str, Iterable[int]], *, config: ModelConfig) -> str:
    """The groups as text, one line each: class, period, decay, tensors, parameters, an example."""
    lines = [f"{'class':<10} {'period':>6} {'decay':>5} {'tensors':>7} {'parameters':>12}  example"]
    for group in group_parameters(shapes, config=config):
        count = sum(_numel(shapes[name]) for name in group.names)
        decay = "yes" if group.rule.decay else "no"
        lines.append(f"{group.rule.kind:<10} {group.rule.period:>6} {decay:>5} {len(group.names):>7} {count:>12,}  {group.names[0]}")
    return "\n".join(lines)


def _numel(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
