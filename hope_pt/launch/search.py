"""Layouts that fit a number of GPUs, fastest first by the model of `hope_pt.launch.speed`."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hope_pt.config.schema import EngineConfig, RunConfig
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.errors import HopeError
from hope_pt.launch.gpus import GPU, budget
from hope_pt.launch.memory import RankBytes, rank_bytes
from hope_pt.launch.speed import StepTime, step_time

DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One layout: its settings, what its fullest rank needs, and how long a step would take."""

    engine: EngineConfig
    mesh: Mesh
    fullest: RankBytes
    time: StepTime


def search(config: RunConfig, *, world_size: int, gpu: GPU, documents: int = 1) -> list[Candidate]:
    """All layouts that fit, fastest first; of equally fast ones the one that needs less.

    Tried: tensor parallelism within a node, pipeline and context parallelism (in the configuration's mode) of powers of two, micro-batches
    of powers of two, recomputation or not, the distributed optimizer or not. Everything else stays as configured.
    """
    found = []
    for engine in _engines(config, world_size=world_size, gpu=gpu):
        trial = config.model_copy(update={"engine": engine})
        try:
            mesh = check_mesh(trial, world_size=world_size)
        except HopeError:
            continue
        fullest = fullest_rank(trial, mesh, documents=documents)
        if fullest.total <= budget(gpu):
            found.append(Candidate(engine, mesh, fullest, step_time(trial, mesh, gpu, documents=documents)))
    return sorted(found, key=lambda one: (one.time.total, one.fullest.total))


def fullest_rank(config: RunConfig, mesh: Mesh, *, documents: int = 1) -> RankBytes:
    """The rank with the highest peak."""
    ranks = (rank_bytes(config, mesh, stage=stage, documents=documents) for stage in range(mesh.pipeline))
    return max(ranks, key=lambda found: found.total)


def _engines(config: RunConfig, *, world_size: int, gpu: GPU) -> Iterator[EngineConfig]:
    for tensor, pipeline, context in itertools.product(DEGREES, repeat=3):
        model_size = tensor * pipeline * context
        if tensor > gpu.per_node or world_size % model_size:
            continue
        data = world_size // model_size
        rows = [rows for rows in DEGREES if rows * data <= config.train.global_batch_size]
        for micro, recompute, distributed in itertools.product(rows, ("none", "block"), (False, True)):
            if distributed and data * context == 1:
                continue
            yield config.engine.model_copy(
                update={
                    "tensor_parallel": tensor,
                    "pipeline_parallel": pipeline,
                    "context_parallel": context,
                    "virtual_stages": 1,
                    "first_stage_layers": 0,
                    "last_stage_layers": 0,
                    "micro_batch_size": micro,
                    "recompute": recompute,
                    "distributed_optimizer": distributed,
                    "overlap_param_gather": config.engine.overlap_param_gather and distributed,
                }
            )
