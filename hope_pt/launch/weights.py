"""Which parameters a rank holds, and what it keeps for each: weights, gradients, masters, optimizer state, accumulated gradients."""

import functools
import math
from dataclasses import dataclass

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.engine import costs
from hope_pt.engine.layerwise import owners
from hope_pt.engine.mesh import Mesh, sharding
from hope_pt.engine.sharding import shard_axis
from hope_pt.launch.activations import META
from hope_pt.nn import HopeLM
from hope_pt.optim.groups import Group, group_parameters
from hope_pt.optim.matrices import View
from hope_pt.optim.rules import UpdateRule, make_rule

FP32 = 4


@dataclass(frozen=True)
class Held:
    """One parameter as one rank holds it.

    columns: of the whole parameter. width: bytes of a weight. period: of its clock. state: bytes of the optimizer's state, fp32. inputs:
    of the sums of layer inputs among it (DGD). flops: matrix products in one update of the whole parameter. cost: the same with its
    elements, by which owners are balanced. exchanged: tensors of this rank's part that one update sends to tensor-parallel ranks or gets
    back. gathered: bytes of state that it gathers from them.
    """

    name: str
    numel: int
    columns: int
    width: int
    period: int
    state: int
    inputs: int
    flops: float
    cost: float
    exchanged: float
    gathered: int

    @property
    def is_replicated(self) -> bool:
        """Not divided over tensor-parallel ranks."""
        return shard_axis(self.name) is None

    @property
    def master(self) -> int:
        """Bytes of the fp32 master of a bf16 weight."""
        return FP32 * self.numel if self.width < FP32 else 0

    @property
    def accumulated(self) -> int:
        """Bytes of the gradients of an interval."""
        return FP32 * self.numel if self.period > 1 else 0


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one rank that do not depend on the batch.

    gradients: megatron's fp32 buffer, and the sums of layer inputs of DGD. optimizer: the state of every rule (two fp32 moments with
    AdamW), and an fp32 master of every bf16 weight. accumulated: what slow CMS levels have summed within an interval; it is freed at its
    end and counted as if it were always there.
    """

    weights: int
    gradients: int
    optimizer: int
    accumulated: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.accumulated


@functools.cache
def _groups(model: ModelConfig, optim: OptimConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Group]]:
    """Whole shape and group of every parameter by its HopeLM name."""
    shapes = {name: tuple(value.shape) for name, value in HopeLM(model, device=META).named_parameters()}
    groups = group_parameters(shapes, config=model, optim=optim)
    return shapes, {name: group for group in groups for name in group.names}


@functools.cache
def _costs(model: ModelConfig, optim: OptimConfig) -> dict[str, float]:
    return costs.update_costs(_groups(model, optim)[0], model=model, optim=optim)


def held(config: RunConfig, mesh: Mesh, *, stage: int) -> list[Held]:
    """The parameters on a rank of pipeline stage `stage`; a tied embedding is on the first and on the last."""
    return _held(config.model, config.optim, config.engine.precision, mesh, stage)


@functools.cache
def _held(model: ModelConfig, optim: OptimConfig, precision: str, mesh: Mesh, stage: int) -> list[Held]:
    blocks = {f"blocks.{index}." for piece in range(mesh.virtual) for index in mesh.layers(stage, piece)}
    first, last = stage == 0, stage == mesh.pipeline - 1
    found = []
    for name in _groups(model, optim)[0]:
        if name == "embedding.weight":
            here = first or (last and model.tie_embeddings)
        else:
            here = name[: name.index(".", 7) + 1] in blocks if name.startswith("blocks.") else last
        if here:
            found.append(_one(name, model=model, optim=optim, precision=precision, tensor=mesh.tensor))
    return found


def _one(name: str, *, model: ModelConfig, optim: OptimConfig, precision: str, tensor: int) -> Held:
    shapes, groups = _groups(model, optim)
    shape, group = shapes[name], groups[name]
    clock, view, numel = group.rule, group.view, math.prod(shape)
    local = numel // (1 if shard_axis(name) is None else tensor)
    is_matrix = len(shape) == 2 and ".core." not in name
    rule = make_rule(clock.optimizer, optim=optim) if view is not None else None
    tensors, own = _state(shape, view, rule)
    divided = False
    if view is not None and view.is_local(len(shape)):
        own //= tensor
    elif view is not None:
        divided = tensor > 1
    # A nested level has state of its own for its initial value, and that, and a sum of gradients.
    twice, more = (2, 2) if clock.restart else (1, 0)
    return Held(
        name=name,
        numel=local,
        columns=shape[-1],
        width=2 if precision == "bf16" and is_matrix else FP32,
        period=clock.period,
        state=FP32 * (twice * (tensors * local + own) + more * local),
        inputs=FP32 * own if rule and rule.reads_inputs else 0,
        flops=costs.update_flops(shape, group, optim=optim),
        cost=_costs(model, optim)[name],
        exchanged=rule.exchanged if rule and divided else 0.0,
        # The sums of inputs are already the same on all of them.
        gathered=FP32 * own if rule and divided and not rule.reads_inputs else 0,
    )


def _state(shape: tuple[int, ...], view: View | None, rule: UpdateRule | None) -> tuple[int, int]:
    """(state tensors of the parameter's shape, elements of state with a shape of its own) of a whole parameter; None: AdamW."""
    if view is None or rule is None:
        return 2, 0
    sizes = rule.matrix_keys(max(view.rows(shape)), shape[-1]).values()
    return len(rule.keys), math.prod(view.lead(shape)) * sum(math.prod(size) for size in sizes)


def weight_bytes(config: RunConfig, mesh: Mesh, *, stage: int) -> WeightBytes:
    """What a rank of `stage` keeps of its parameters; layer-wise, the rank that keeps the most."""
    parameters = held(config, mesh, stage=stage)
    kept = owned(config, mesh, stage=stage)
    ranks = mesh.data * mesh.context if sharding(config) == "elements" else 1
    optimizer, accumulated = max(
        ((sum(p.master + p.state for p in own), sum(p.accumulated for p in own)) for own in kept), key=lambda pair: sum(pair)
    )
    return WeightBytes(
        weights=sum(p.numel * p.width for p in parameters),
        gradients=sum(FP32 * p.numel + p.inputs for p in parameters),
        optimizer=-(-optimizer // ranks),
        accumulated=-(-accumulated // ranks),
    )


def owned(config: RunConfig, mesh: Mesh, *, stage: int) -> list[list[Held]]:
    """What each rank of the data and context axes updates; one list for all where they do not divide whole parameters."""
    parameters = held(config, mesh, stage=stage)
    if sharding(config) != "layers":
        return [parameters]
    ranks = mesh.data * mesh.context
    of = owners({p.name: p.cost for p in parameters}, periods={p.name: p.period for p in parameters}, ranks=ranks)
    return [[p for p in parameters if of[p.name] == rank] for rank in range(ranks)]


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint's tensors, whatever the layout: fp32 masters, optimizer state, accumulated gradients of slow levels."""
    names = _groups(config.model, config.optim)[0]
    whole = [_one(name, model=config.model, optim=config.optim, precision="fp32", tensor=1) for name in names]
    return sum(FP32 * p.numel + p.state + p.accumulated for p in whole)
