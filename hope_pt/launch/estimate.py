"""`hope estimate`: everything a configuration costs on a number of GPUs, as one object that a table or JSON is made of."""

from dataclasses import asdict, dataclass
from typing import Any

from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.launch.communication import Sent, sent
from hope_pt.launch.gpus import GPU, budget
from hope_pt.launch.kernels import Scans, scans
from hope_pt.launch.memory import RankBytes, rank_bytes
from hope_pt.launch.speed import StepTime, bubble_fraction, step_time
from hope_pt.launch.weights import checkpoint_bytes
from hope_pt.nn import count_parameters, flops_per_token


@dataclass(frozen=True)
class Estimate:
    """parameters: by class, with "total". flops: per token, by part. ranks, sent: of the first, a middle and the last pipeline stage.

    scans: what memory and time are planned for.
    """

    name: str
    gpu: GPU
    mesh: Mesh
    scans: Scans
    parameters: dict[str, int]
    flops: dict[str, float]
    ranks: tuple[RankBytes, ...]
    sent: dict[int, Sent]
    bubble: float
    checkpoint_bytes: int
    time: StepTime
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only; ranks with their totals."""
        found = asdict(self)
        for entry, rank in zip(found["ranks"], self.ranks, strict=True):
            entry["total"] = rank.total
        found["sent"] = {str(stage): asdict(one) | {"total": one.total} for stage, one in self.sent.items()}
        return found


def stages_to_show(mesh: Mesh) -> list[int]:
    """The first, a middle and the last pipeline stage, and any other with a number of blocks of its own."""
    shown = {0, mesh.pipeline // 2, mesh.pipeline - 1}
    counts = {mesh.stage_layers[stage] for stage in shown}
    others = {stage for stage in range(mesh.pipeline) if mesh.stage_layers[stage] not in counts}
    return sorted(shown | others)


def estimate(config: RunConfig, *, world_size: int, gpu: GPU, documents: int = 1) -> Estimate:
    """What `config` costs on `world_size` GPUs when every row of data is `documents` documents. Errors as in `check_mesh`."""
    mesh = check_mesh(config, world_size=world_size)
    stages = stages_to_show(mesh)
    ranks = tuple(rank_bytes(config, mesh, stage=stage, documents=documents) for stage in stages)
    return Estimate(
        name=config.name,
        gpu=gpu,
        mesh=mesh,
        scans=scans(config),
        parameters=count_parameters(config.model),
        flops=flops_per_token(config.model, seq_len=mesh.tokens_per_rank * mesh.context),
        ranks=ranks,
        sent={stage: sent(config, mesh, stage=stage) for stage in stages},
        bubble=bubble_fraction(mesh),
        checkpoint_bytes=checkpoint_bytes(config),
        time=step_time(config, mesh, gpu, documents=documents),
        fits=max(rank.total for rank in ranks) <= budget(gpu),
    )
