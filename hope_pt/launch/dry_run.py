"""`hope train --dry-run`: the real plan and the real model of a job that does not exist, on the meta device, for its whole world size.

Every pipeline stage that differs from the others is built as its first rank would build it. Nothing reads data or writes a directory.
"""

from dataclasses import dataclass

from hope_pt.config.schema import RunConfig
from hope_pt.engine.compat import quiet
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.launch.estimate import stages_to_show


@dataclass(frozen=True)
class BuiltRank:
    """What one rank built. blocks: of all its pieces; parameters, weight_bytes: as they are on the meta device."""

    rank: int
    stage: int
    blocks: int
    parameters: int
    weight_bytes: int


def dry_run(config: RunConfig, *, world_size: int) -> tuple[Mesh, list[BuiltRank]]:
    """The layout of `world_size` processes and its distinct ranks. Errors as in `engine.start`, but for those of the machine."""
    mesh = check_mesh(config, world_size=world_size)
    return mesh, [_build(config, mesh, stage=stage) for stage in stages_to_show(mesh)]


def _build(config: RunConfig, mesh: Mesh, *, stage: int) -> BuiltRank:
    with quiet():
        from hope_pt.engine.model import build_model
        from hope_pt.engine.plan import rehearse, stop

        rank = next(rank for rank in range(mesh.world_size) if mesh.coordinates(rank)["pipeline"] == stage)
        plan = rehearse(config, world_size=mesh.world_size, rank=rank)
        try:
            parameters = [parameter for piece in build_model(config, plan=plan) for parameter in piece.parameters()]
        finally:
            stop(plan)
    return BuiltRank(
        rank=rank,
        stage=stage,
        blocks=mesh.stage_layers[stage],
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
    )
