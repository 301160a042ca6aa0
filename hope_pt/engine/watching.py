"""The outer optimizer's guard rails and measurements (hope_pt.optim.watch) under a parallel layout.

Which elements of the whole model a rank holds, which of them it counts in sums over the job, and the sum itself: one all-reduce over all
ranks. Where data-parallel ranks hold the same parameters, each counts (and measures) its share of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_pt.config.schema import RunConfig
from hope_pt.engine.matrices import matrices_of
from hope_pt.engine.plan import Plan
from hope_pt.engine.sharding import shard_axis
from hope_pt.nn import HopeLM
from hope_pt.optim.clocks import Clocked
from hope_pt.optim.groups import Group
from hope_pt.optim.guards import Guards, frozen
from hope_pt.optim.held import Held
from hope_pt.optim.matrices import Matrices
from hope_pt.optim.measure import Measures
from hope_pt.optim.nested import Nested
from hope_pt.optim.rules import make_rule
from hope_pt.optim.watch import Watched


@dataclass(frozen=True)
class Piece:
    """What this rank's optimizer updates of one parameter: the fp32 tensor `main`, elements first to end of the flattened parameter.

    Without the distributed optimizer that is all of it, in its own shape.
    """

    main: Tensor
    first: int
    end: int

    def cut(self, value: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape."""
        return value.reshape(-1)[self.first : self.end].view(self.main.shape)


def watch(
    clocked: Clocked,
    *,
    pieces: Mapping[str, Piece],
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Group],
    shared: bool,
    config: RunConfig,
    plan: Plan,
) -> tuple[Watched, list[Tensor]]:
    """The watched optimizer, and what it may not be given gradients for. shared: data-parallel ranks hold the same pieces."""
    held = [
        _held(name, piece, parameters[name], matrices=_matrices(name, parameters[name], groups=groups, config=config, plan=plan), plan=plan)
        for name, piece in pieces.items()
    ]
    if shared:
        replicas = plan.groups.data_context
        counted = [one.counted and index % replicas.size() == replicas.rank() for index, one in enumerate(held)]
        held = [dataclasses.replace(one, counted=counts) for one, counts in zip(held, counted, strict=True)]
    optim, every = config.optim, config.eval.levels_every
    meta = HopeLM(config.model, device=torch.device("meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in meta.named_parameters()}
    guards = Guards(held, shapes=shapes, model=config.model, optim=optim, total=dist.all_reduce, device=plan.device)
    measures = Measures(
        held, shapes=shapes, model=config.model, frozen=optim.freeze_levels, every=every, total=dist.all_reduce, device=plan.device
    )
    nested = [optimizer for optimizer in clocked.inner if isinstance(optimizer, Nested)]

    def origin(main: Tensor) -> Tensor | None:
        found = [start for optimizer in nested if (start := optimizer.origin(main)) is not None]
        return found[0] if found else None

    watched = Watched(clocked, held=held, guards=guards, measures=measures if every else None, origin=origin)
    return watched, frozen(held, levels=optim.freeze_levels)


def _held(name: str, piece: Piece, parameter: nn.Parameter, *, matrices: Matrices | None, plan: Plan) -> Held:
    axis, tensor = shard_axis(name), plan.groups.tensor
    return Held(
        name=name,
        main=piece.main,
        shard_shape=tuple(parameter.shape),
        first=piece.first,
        axis=axis,
        index=tensor.rank(),
        count=tensor.size(),
        # A tied embedding is counted on the first stage, what all tensor-parallel ranks hold on the first of them.
        counted=not getattr(parameter, "shared", False) and (axis is not None or tensor.rank() == 0),
        matrices=matrices,
    )


def _matrices(name: str, parameter: nn.Parameter, *, groups: Sequence[Group], config: RunConfig, plan: Plan) -> Matrices | None:
    for group in groups:
        if name in group.names and group.view and make_rule(group.rule.optimizer, optim=config.optim).orthogonalises:
            return matrices_of(group.view, ndim=parameter.dim(), group=plan.groups.tensor)
    return None
