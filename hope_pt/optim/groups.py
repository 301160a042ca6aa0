"""Which parameter gets what (SPEC 4): groups of the outer optimizer by rule on the canonical names of `hope_pt.nn`.

| class     | parameters                                                             | optimizer      | weight decay | period  |
|-----------|------------------------------------------------------------------------|----------------|--------------|---------|
| matrix    | in_proj, out_proj of the mixers                                        | optim.name     | yes          | 1       |
| memory    | initial states of the fast-weight memories                             | optim.memory   | no           | 1       |
| gate      | all other per-head parameters: readouts, biases, convolutions, norms   | AdamW          | no           | 1       |
| norm      | weights of the norms before the mixer and the head                     | AdamW          | no           | 1       |
| embedding | embedding and untied head                                              | AdamW          | no           | 1       |
| cms       | the matrices of CMS level l                                            | optim.levels l | yes          | n_l     |
| cms-norm  | norm and weight of CMS level l                                         | AdamW          | no           | n_l     |

A level's norm belongs to its level: a frozen level computes the same function until its clock ticks. Initial states of memories are
started by gradient descent in every sequence and are not decayed towards zero, which is not where they start. Parameters of a deep rule
are grouped by shape too, because they are updated as one stack. docs/optimizers.md has the reasons for the scales by width.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hope_pt.config.optim import OptimConfig, OptimizerName
from hope_pt.config.schema import ModelConfig
from hope_pt.nn.names import level_of
from hope_pt.optim.matrices import View, view_of
from hope_pt.optim.rules import make_rule

ADAMW = OptimConfig()
"""AdamW for all parameters."""
_MEMORY = re.compile(r"\.core\.(mem|proj)_weights\.")


@dataclass(frozen=True)
class Rule:
    """What one parameter gets. lr_scale multiplies the scheduled learning rate. restart: see `CMSConfig.restart`."""

    kind: str
    decay: bool
    period: int = 1
    optimizer: OptimizerName = "adamw"
    lr_scale: float = 1.0
    restart: int = 0


@dataclass(frozen=True)
class Group:
    """Parameters that share a rule, in the order in which they were given. view: as matrices, None with AdamW."""

    rule: Rule
    names: tuple[str, ...]
    view: View | None = None


def rule_of(name: str, *, ndim: int, config: ModelConfig, optim: OptimConfig = ADAMW) -> Rule:
    """Rule of the parameter with canonical name `name` and `ndim` dimensions. optim: the default is AdamW for all."""
    place = level_of(name)
    if place:
        index, block = place
        period, restart = config.cms.period(index, block=block), config.cms.restart(index)
        if ndim == 1:
            return Rule("cms-norm", False, period, restart=restart)
        optimizer = optim.levels[index] if optim.levels else optim.name
        return Rule("cms", True, period, optimizer, lr_scale(optimizer, config=config, optim=optim), restart)
    if name in ("embedding.weight", "head.weight"):
        return Rule("embedding", False)
    if name.endswith(("in_proj.weight", "out_proj.weight")):
        return Rule("matrix", True, 1, optim.name, lr_scale(optim.name, config=config, optim=optim))
    if name.endswith("norm.weight") and ndim == 1:
        return Rule("norm", False)
    if _MEMORY.search(name):
        return Rule("memory", False, 1, optim.memory, lr_scale(optim.memory, config=config, optim=optim))
    return Rule("gate", False)


def lr_scale(optimizer: OptimizerName, *, config: ModelConfig, optim: OptimConfig) -> float:
    """Learning rate of a matrix with this optimizer over the scheduled one: its own peak, times the scale by width."""
    own = optim.matrix_lr / optim.lr if optim.matrix_lr and optimizer != "adamw" else 1.0
    return own * (optim.base_width / config.width) ** width_exponent(optimizer, optim=optim) if optim.base_width else own


def width_exponent(optimizer: OptimizerName, *, optim: OptimConfig) -> float:
    """The exponent e of lr = optim.lr (base_width / width)^e: the rule's (`UpdateRule.width_exponent`), and 1 for AdamW."""
    return 1.0 if optimizer == "adamw" else make_rule(optimizer, optim=optim).width_exponent


def group_parameters(shapes: Mapping[str, Iterable[int]], *, config: ModelConfig, optim: OptimConfig = ADAMW) -> list[Group]:
    """Groups of the parameters with the given canonical names and shapes, whole or a rank's, in the order of first appearance."""
    members: dict[tuple[Rule, tuple[int, ...], View | None], list[str]] = {}
    for name, sizes in shapes.items():
        shape = tuple(sizes)
        rule = rule_of(name, ndim=len(shape), config=config, optim=optim)
        deep = rule.optimizer != "adamw"
        # What a rule reads of the layer's inputs is the same for all streams of an input projection.
        view = view_of(name, config=config, split=not make_rule(rule.optimizer, optim=optim).reads_inputs) if deep else None
        members.setdefault((rule, shape if deep else (), view), []).append(name)
    return [Group(rule, tuple(names), view) for (rule, _, view), names in members.items()]


def table(shapes: Mapping[str, Iterable[int]], *, config: ModelConfig, optim: OptimConfig = ADAMW) -> str:
    """The groups as text, one line each: class, optimizer, lr scale, period, decay, tensors, parameters, an example."""
    lines = [f"{'class':<10} {'optimizer':<14} {'lr':>7} {'period':>6} {'decay':>5} {'tensors':>7} {'parameters':>13}  example"]
    for group in group_parameters(shapes, config=config, optim=optim):
        rule = group.rule
        count = sum(_numel(shapes[name]) for name in group.names)
        decay = "yes" if rule.decay else "no"
        lines.append(
            f"{rule.kind:<10} {rule.optimizer:<14} {'x' + format(rule.lr_scale, '.3g'):>7} {rule.period:>6} {decay:>5} "
            f"{len(group.names):>7} {count:>13,}  {group.names[0]}"
        )
    return "\n".join(lines)


def _numel(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
