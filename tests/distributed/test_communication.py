"""What ranks send in a real step, counted operator by operator, against the planner's formulas."""

from collections import Counter

import pytest

from hope_pt.config.schema import RunConfig
from hope_pt.engine import Launch
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.communication import Sent, sent
from hope_pt.testing import run_distributed, tiny_model, tiny_run
from hope_pt.testing.communication import CommunicationCounter
from hope_pt.testing.layouts import part_at, running, with_engine

# megatron pads the buffers that its distributed optimizer divides; in models this small that is a visible share of them.
PADDED, PADDING = {"gradients", "parameters"}, 0.02
RANKS = 4
LAYOUTS = {
    "tp2-sp-dp2": {"tensor_parallel": 2},
    "tp2-dp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "tp2-sp-recomputed": {"tensor_parallel": 2, "recompute": "block"},
    "pp2-dp2": {"pipeline_parallel": 2},
    "pp2-virtual": {"pipeline_parallel": 2, "virtual_stages": 2},
    "tp2-pp2-sp": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "cp2-heads-tp2": {"tensor_parallel": 2, "context_parallel": 2},
    "cp2-heads-recomputed": {"context_parallel": 2, "recompute": "block"},
    "cp2-state": {"context_parallel": 2, "context_mode": "state"},
    "cp4-state-recomputed": {"context_parallel": 4, "context_mode": "state", "recompute": "block"},
    "dp4": {},
    "dp4-distributed": {"distributed_optimizer": True},
    "tp2-dp2-distributed-overlapped": {
        "tensor_parallel": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    },
}  # fmt: skip


def config_of(layout: str, *, mixer="titans", precision="fp32") -> RunConfig:
    layers = 4 if layout == "pp2-virtual" else 2
    model = tiny_model(mixer=mixer, periods=(1, 2)).model_copy(update={"num_layers": layers, "num_heads": 4, "width": 64})
    config = tiny_run(model=model, global_batch_size=4, seq_len=16, precision=precision)
    # Measurements of the levels are not part of every step.
    unmeasured = config.model_copy(update={"eval": config.eval.model_copy(update={"levels_every": 0})})
    return with_engine(unmeasured, **LAYOUTS[layout])


def count(launch: Launch, configs: dict[str, RunConfig]) -> dict[str, Counter]:
    """What this rank sends in a step of every layout; overlapped gathers of weights belong to the step before, so there the second."""
    found = {}
    for name, config in configs.items():
        with running(config, launch=launch, key=name) as engine:
            for step in range(1 + config.engine.overlap_param_gather):
                batch = part_at(engine, step)
                with CommunicationCounter(engine.plan) as counter:
                    engine.step(batch)
            found[name] = counter.sent
    return found


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[RunConfig, list[Counter]]]:
    """Layout -> its configuration and what every rank sent; one set of processes for all."""
    configs = {name: config_of(name) for name in LAYOUTS}
    configs["cp2-state-attention"] = with_engine(config_of("dp4", mixer="attention"), context_parallel=2, context_mode="state")
    configs["bf16-distributed"] = config_of("tp2-dp2-distributed-overlapped", precision="bf16")
    ranks = run_distributed(count, world_size=RANKS, timeout_s=110, args=(configs,))
    return {name: (config, [rank[name] for rank in ranks]) for name, config in configs.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS, "cp2-state-attention", "bf16-distributed"])
def test_the_planner_knows_what_is_sent(counted, layout):
    """Per stage and kind, the mean over the ranks of the stage; `other` is a number or two."""
    config, ranks = counted[layout]
    mesh = check_mesh(config, world_size=RANKS)
    for stage in range(mesh.pipeline):
        members = [found for rank, found in enumerate(ranks) if mesh.coordinates(rank)["pipeline"] == stage]
        planned = vars(sent(config, mesh, stage=stage))
        measured = {kind: sum(found[kind] for found in members) / len(members) for kind in planned}
        for kind, size in planned.items():
            padded = config.engine.distributed_optimizer and kind in PADDED
            assert measured[kind] == pytest.approx(size, rel=PADDING if padded else 0.0, abs=64), f"{kind} of stage {stage}"
        assert max(found["other"] for found in members) <= 64


def test_kinds_are_those_of_the_layout():
    """No kind is zero where its axis is used, or the comparison above would be empty."""

    def kinds(layout: str) -> set[str]:
        config = config_of(layout)
        found: Sent = sent(config, check_mesh(config, world_size=RANKS), stage=0)
        return {kind for kind, size in vars(found).items() if size}

    assert kinds("tp2-pp2-sp") == {"tensor", "pipeline", "embedding"}
    assert kinds("cp2-heads-tp2") == {"tensor", "context", "gradients"}
    assert kinds("cp2-state") == {"context", "gradients"}
    assert kinds("dp4-distributed") == {"gradients", "parameters"}
