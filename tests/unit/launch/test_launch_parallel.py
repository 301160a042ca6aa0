"""The planner's activations against the engine's on four processes: its imitations of megatron's layers, schedules and context modes.

The engine's tensors are counted as they are made and freed in a whole step; tools/bench/memory.py measures the process from outside.
"""

import gc

import pytest
import torch

from hope_pt.config.schema import CMSConfig, ModelConfig, RunConfig, TitansConfig
from hope_pt.engine import Launch
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.allocations import AllocationCounter
from hope_pt.launch.memory import rank_bytes
from hope_pt.testing import RandomBatch, run_distributed, tiny_run
from hope_pt.testing.layouts import running, with_engine

LENGTH = 64
LAYOUTS = {
    "tp2-sp": ({"tensor_parallel": 2}, 0.02),
    "tp4-sp-recomputed": ({"tensor_parallel": 4, "recompute": "block"}, 0.05),
    "pp4": ({"pipeline_parallel": 4}, 0.05),
    "pp2-virtual": ({"pipeline_parallel": 2, "virtual_stages": 2}, 0.05),
    "cp2-heads": ({"context_parallel": 2}, 0.02),
    "cp2-state": ({"context_parallel": 2, "context_mode": "state"}, 0.05),
}
"""Layout, and how far the plan may be off the fullest rank of a stage; where states are handed on, the last rank needs less."""


def config_of(layout: str) -> RunConfig:
    titans = TitansConfig(chunk_mem=16, chunk_proj=32)
    model = ModelConfig(
        vocab_size=512, num_layers=4, width=128, num_heads=8, titans=titans, cms=CMSConfig(hidden=128, periods=(1, 1))
    )  # fmt: skip
    return with_engine(tiny_run(model=model, global_batch_size=4, seq_len=LENGTH), **LAYOUTS[layout][0])


def peaks(launch: Launch, configs: dict[str, RunConfig]) -> dict[str, int]:
    """The most bytes that a step of every layout adds on this rank, when all optimizer state exists."""
    found = {}
    for name, config in configs.items():
        with running(config, launch=launch, key=name) as engine:
            rows = config.train.global_batch_size // engine.plan.dp_size
            tokens = torch.randint(0, config.model.vocab_size, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
            starts = torch.zeros(rows, LENGTH, dtype=torch.bool)
            batch = RandomBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, LENGTH), starts)
            engine.step(batch)
            gc.collect()
            with AllocationCounter(tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)) as counter:
                engine.step(batch)
            found[name] = counter.peak
    return found


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    return run_distributed(peaks, world_size=4, timeout_s=110, args=({name: config_of(name) for name in LAYOUTS},))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_needs_what_was_planned(measured, layout):
    config, tolerance = config_of(layout), LAYOUTS[layout][1]
    mesh = check_mesh(config, world_size=4)
    for stage in range(mesh.pipeline):
        fullest = max(found[layout] for rank, found in enumerate(measured) if mesh.coordinates(rank)["pipeline"] == stage)
        planned = rank_bytes(config, mesh, stage=stage)
        # megatron makes its buffers for gathered inputs in the first step and keeps them: the counter of a later one does not see them
        assert planned.activations + planned.working == pytest.approx(fullest, rel=tolerance), f"stage {stage}"
